"""What bench/study.py looks at, and the steps that it takes."""
