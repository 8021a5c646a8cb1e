import re

import pytest

from flexdistill.errors import FlexdistillError
from flexdistill.layer_expressions import select_layers

NAMES = [f"layers.{index}.self_attn" for index in range(8)]


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ("all", [0, 1, 2, 3, 4, 5, 6, 7]),
        ("0", [0]),
        ("7", [7]),
        ("0-2,5", [0, 1, 2, 5]),
        ("5,0-2,1", [0, 1, 2, 5]),
        ("every:3", [0, 3, 6]),
        ("every:1", [0, 1, 2, 3, 4, 5, 6, 7]),
        ("every:100", [0]),
        ("every:3,1", [0, 1, 3, 6]),
        ("layers.*", [0, 1, 2, 3, 4, 5, 6, 7]),
        ("layers.2.self_attn", [2]),
        ("*.[13].*,6", [1, 3, 6]),
    ],
)
def test_select_layers(expression, expected):
    assert select_layers(expression, NAMES) == expected


@pytest.mark.parametrize(
    "expression", ["", "some", "1-", "-1", "5-2", "1,,2", "every:", "every:0", "every:-2", "every:x", "1.5"]
)
def test_unreadable_layers_are_errors(expression):
    with pytest.raises(FlexdistillError, match="cannot be read; write all, indices such as 0-5,9 or every:4"):
        select_layers(expression, NAMES)


@pytest.mark.parametrize("expression", ["8", "0-8", "0-99999999999", "3,9", "encoder.*", "0,h.1.attn"])
def test_absent_layers_are_errors(expression):
    with pytest.raises(FlexdistillError, match=f"Layers '{re.escape(expression)}' are not all there; .* layers 0 to 7"):
        select_layers(expression, NAMES)
