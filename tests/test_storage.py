import json
import math

import pytest

from flexdistill.errors import FlexdistillError
from flexdistill.storage import expanded, to_json, write_json


def test_json_has_no_word_for_what_is_not_finite(tmp_path):
    value = {"perplexity": math.inf, "rows": [1.5, (math.nan, "x")], "name": None, "count": 3}
    expected = {"perplexity": None, "rows": [1.5, [None, "x"]], "name": None, "count": 3}

    def refused(word):
        raise AssertionError(word)

    assert json.loads(to_json(value), parse_constant=refused) == expected
    write_json(tmp_path / "x.json", value)
    assert json.loads((tmp_path / "x.json").read_text(), parse_constant=refused) == expected


def test_homes(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert expanded("~/a") == tmp_path / "a" and expanded(tmp_path) == tmp_path
    with pytest.raises(FlexdistillError, match="names the home of a user that is not known; write the whole path"):
        expanded("~nobody-of-this-name/a")
