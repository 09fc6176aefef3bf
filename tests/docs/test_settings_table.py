"""The table of the [lighthouse] section in README.md."""

import re
import tomllib
from dataclasses import fields
from pathlib import Path

from torchtitan.experiments.lighthouse.job_config import Lighthouse

README = Path(__file__).resolve().parents[2] / "README.md"


def test_every_setting_is_there_with_its_default():
    section = re.search(r"^## Settings.*?(?=^## )", README.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert section
    rows = re.findall(r"^\| `(\w+)` \| `(.+?)` \|", section[0], re.MULTILINE)
    table = {name: tomllib.loads(f"value = {default}")["value"] for name, default in rows}
    assert table == {field.name: field.default for field in fields(Lighthouse)}
