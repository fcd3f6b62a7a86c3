"""Every architecture of transformers: a fixed part of the table and one that changes with the day.

`make conformity` runs the whole of it. What the page says about a row must be what is found here.
"""

import datetime
import os
import re

import conformity
import pytest
import transformers
from conformity import NOT_BUILT, PAGE, TITLE, examine, line, table

# One per layout, activation and way to end.
FIXED = (
    "MixtralExperts",
    "DeepseekV3Experts",
    "DeepseekV4Experts",  # clamped
    "Gemma4TextExperts",  # GELU, negative routing weights
    "GptOssExperts",  # transposed, interleaved, biases
    "OpenAIPrivacyFilterExperts",  # transposed, concatenated, biases
    "AriaExperts",  # transposed
    "NemotronHExperts",  # no gate
    "MuseSparkExperts",  # a norm after each expert
    "Inkling2Experts",  # an activation that no kernel fuses
    "Qwen3OmniMoeTalkerTextExperts",  # class only
    "Llama4TextExperts",  # weights on the input
    "DbrxExperts",  # not dispatched, fused
    "Ernie4_5_VLMoeMoeExperts",  # vision experts that text does not reach
    "DogeCDMoE",  # refused
)
ROTATING = 8
SEED = int(os.environ.get("CONFORMITY_SEED", datetime.date.today().toordinal()))
ROWS = table()


def chosen():
    """The fixed rows that this release has, and the next ROTATING others; the seed is in a test's name."""
    others = [row for row in ROWS if row.class_name not in FIXED]
    start = SEED * ROTATING % len(others)
    rotating = (others * 2)[start : start + ROTATING]
    fixed = [pytest.param(row, id=row.class_name) for row in ROWS if row.class_name in FIXED]
    return fixed + [pytest.param(row, id=f"{row.class_name}-CONFORMITY_SEED={SEED}") for row in rotating]


def page_of_this_release():
    """The committed page, or None if it was made with another release."""
    text = PAGE.read_text(encoding="utf-8")
    return text if text.startswith(TITLE.format(version=transformers.__version__) + ":") else None


@pytest.mark.parametrize("row", chosen())
def test_row(row):
    result = examine(row)
    assert not result.problems
    text = page_of_this_release()
    if text is not None:
        assert line(result) in text, "run make conformity"
    if result.coverage == NOT_BUILT:
        pytest.skip(f"not built: {result.reason}")


def test_the_page_lists_exactly_the_classes_of_this_release():
    text = page_of_this_release()
    if text is None:
        pytest.skip(f"docs/models.md was made with another transformers than {transformers.__version__}")
    listed = re.findall(r"^\| `(\w+)` \| (\w+) \|", text, re.MULTILINE)
    assert sorted(listed) == sorted((row.class_name, row.folder) for row in ROWS), "run make conformity"
    assert "**no**" not in text


def test_a_class_that_the_scan_does_not_understand_is_an_error(tmp_path, monkeypatch):
    folder = tmp_path / "new"
    folder.mkdir()
    monkeypatch.setattr(conformity, "SOURCES", tmp_path)
    source = "@use_experts_implementation(\n    has_bias=True,\n)\n@other\nclass NewExperts(nn.Module):\n"
    (folder / "modeling_new.py").write_text(source + "class OldExperts(nn.Module):\n")
    assert [(row.class_name, row.dispatched) for row in table()] == [
        ("NewExperts", True),
        ("OldExperts", False),
    ]
    (folder / "modeling_new.py").write_text("@use_experts_implementation\nmake_experts = 1\n")
    with pytest.raises(RuntimeError, match="does not understand"):
        table()


def test_a_difference_is_a_problem():
    result = conformity.Result(
        ROWS[0], fp32=float("nan"), bf16=0.1, bf16_output=0.1, bf16_eager=0.01, tokens=False
    )
    assert len(result.problems) == 4
    result = conformity.Result(ROWS[0], fp32=1e-6, bf16=0.01, bf16_output=0.03, bf16_eager=0.02, tokens=True)
    assert not result.problems
