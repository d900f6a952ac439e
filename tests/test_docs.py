"""What the site's own check cannot see: the reference is complete, and the tutorial's settings are settings."""

import re
from pathlib import Path

import yaml

import focuskernels
from focusnet.config import Config

DOCS = Path(__file__).parents[1] / "docs"


def test_every_operation_is_in_the_reference() -> None:
    documented = re.findall(r"^::: focuskernels\.\w+\.(\w+)$", (DOCS / "api/focuskernels.md").read_text(), re.MULTILINE)
    assert sorted(documented) == sorted(focuskernels.__all__)


def test_tutorial_settings_are_valid() -> None:
    (text,) = re.findall(r"```yaml\n(.*?)```", (DOCS / "tutorial.md").read_text(), re.DOTALL)
    assert Config.from_dict(yaml.safe_load(text)).data.small_organs == ["Eye_L", "Eye_R"]
