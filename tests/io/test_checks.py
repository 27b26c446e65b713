from __future__ import annotations

import pytest

from pose2id.io.checks import first_few


@pytest.mark.parametrize(
    ("names", "options", "expected"),
    [
        ([], {}, ""),
        ("abc", {}, "a, b, c"),
        (range(10), {}, "0, 1, 2, ... and 7 more"),
        (range(10), {"most": 9, "separator": "; "}, "0; 1; 2; 3; 4; 5; 6; 7; 8; ... and 1 more"),
        (["a", "b"], {"total": 9}, "a, b, ... and 7 more"),
    ],
)
def test_the_first_few_then_how_many_more(names, options, expected):
    assert first_few(iter(names), **options) == expected
