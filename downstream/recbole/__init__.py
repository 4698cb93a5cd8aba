"""The bridge to RecBole: item tables from Parquet, training runs, and cures for what its last release breaks on."""
