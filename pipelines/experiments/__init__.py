"""A study: its methods as data, the schedule of its steps, and its results as Parquet files."""
