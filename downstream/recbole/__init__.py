"""The bridge to RecBole: item tables from Parquet, training runs, and fixes for its last release."""
