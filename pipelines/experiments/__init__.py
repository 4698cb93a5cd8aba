"""A study: methods and seeds as data, a schedule of steps, and the results as Parquet."""
