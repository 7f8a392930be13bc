"""What a row adds, by hand."""

from bench.memory import growth


def test_growth_is_the_difference_of_sizes_over_that_of_rows() -> None:
    sizes = [(1000, 100, 2.0), (3000, 101, 2.5), (5000, 103, 3.5)]
    table = [{"rows": rows, "stage": "embed", "own MiB": mib, "cpu s": seconds} for rows, mib, seconds in sizes]
    table.insert(1, {"rows": 1000, "stage": "train", "own MiB": 5, "cpu s": 1.0})
    assert growth(table) == [
        {"stage": "embed", "from": 1000, "to": 3000, "bytes/row": 524, "cpu ms/row": 0.25},
        {"stage": "embed", "from": 3000, "to": 5000, "bytes/row": 1049, "cpu ms/row": 0.5},
    ]
