"""Self-contained report pages and figures with the data behind them; serves training, sweeps and evaluation."""
