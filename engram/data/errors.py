"""What users see when their text, tokenizer or prepared folder cannot be used."""

from engram.config import UserError


class DataError(UserError):
    """Text, a tokenizer or a prepared folder cannot be used: names what and where, the limit, and what to do."""
