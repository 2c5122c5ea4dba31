"""Each recipe of docs/jobs.md runs, and is short."""

from __future__ import annotations

import pytest
import torch
from documents import ROOT, snippets

FIRST, *RECIPES = snippets(ROOT / "docs" / "jobs.md")


@pytest.mark.parametrize("recipe", RECIPES, ids=[str(i) for i in range(len(RECIPES))])
@pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad")
def test_a_recipe_runs(recipe):
    assert len(recipe.splitlines()) <= 15
    before = torch.get_default_dtype()
    try:
        exec(FIRST + recipe, {})
    finally:
        torch.set_default_dtype(before)
