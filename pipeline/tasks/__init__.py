"""What a benchmark task is: suites, instructions, local data, their texts."""
