"""The planted study as `collect` leaves it, once for all tests that only read it."""

import pytest

from engram.sweep.grid import expand
from engram.sweep.spec import Sweep
from engram.sweep.study import Study, fits
from engram.sweep.tables import Row, read_table
from tests.sweep.planted import make_study, write_tables


@pytest.fixture(scope="session")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Sweep:
    sweep = make_study(tmp_path_factory.mktemp("planted"))
    write_tables(sweep, expand(sweep))
    return sweep


@pytest.fixture(scope="session")
def rows(sweep: Sweep) -> list[Row]:
    return read_table(sweep.out / "runs.parquet")


@pytest.fixture(scope="session")
def study(sweep: Sweep, rows: list[Row]) -> Study:
    return fits(sweep, rows)
