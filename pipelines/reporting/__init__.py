"""One page about a study: its tables, figures and verdicts, drawn only from its Parquet files."""
