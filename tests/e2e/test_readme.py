"""README's example in Python runs as it stands."""

import re
from pathlib import Path

import torch

README = Path(__file__).parents[2] / "README.md"


def test_the_first_example_runs(capsys):
    torch.manual_seed(0)
    text = re.search(r"^```python\n(.*?)^```", README.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)[1]
    assert len([line for line in text.splitlines() if line.strip()]) <= 15
    names = {}
    exec(compile(text, str(README), "exec"), names)
    assert len(names["cuts"]) > 50
    assert capsys.readouterr().out.count("of the compute before it") == 3
