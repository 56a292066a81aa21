"""From text to batches: corpora -> documents -> tokenizer -> shards -> loader."""
