"""The claims of the talk: each is one command, and each experiment leaves numbers, a sentence and a picture."""

from __future__ import annotations

import csv
import importlib
from dataclasses import replace

import pytest
import talk  # which imports the experiments late: they register methods, of which no other test may know

SMALLEST = {"depth": 2, "width": 16, "epochs": 1, "seeds": 2, "rates": (0.1, 0.3), "examples": 256}
OF_ITS_OWN = {"depth": {"depths": (1, 2, 3), "steps": 4}, "pca": {"rates": (4.0,)}}
"""Smaller than ``--tiny``: of the network that most have, and of claims that have another."""


@pytest.mark.parametrize("name", talk.EXPERIMENTS)
def test_an_experiment_leaves_numbers_a_sentence_and_a_picture(name, tmp_path, monkeypatch):
    claim = talk.claim(name)
    smallest = replace(claim, tiny=replace(claim.tiny, **OF_ITS_OWN.get(name, SMALLEST)))
    monkeypatch.setattr(importlib.import_module(f"claims.{name}"), "CLAIM", smallest)
    assert talk.main([name, "--tiny", "--out", str(tmp_path)]) == 0
    folder = tmp_path / f"{name}-tiny"
    rows = list(csv.DictReader((folder / "rows.csv").read_text().splitlines()))
    assert rows
    assert all(value != "" for row in rows for value in row.values())
    sentence = (folder / "sentence.txt").read_text()
    assert any(character.isdigit() for character in sentence)
    assert "nan" not in sentence
    assert (folder / "figure.png").stat().st_size > 5_000


@pytest.mark.parametrize("name", talk.COMPARISONS)
def test_a_comparison_is_one_that_can_be_made(name, tmp_path, capsys):
    """At its tiny size; as published it is tried with the other published ones."""
    assert talk.main([name, "--tiny", "--out", str(tmp_path), "--", "--dry-run"]) == 0
    assert "runs" in capsys.readouterr().out


def test_without_a_name_the_claims_are_listed(capsys):
    assert talk.main([]) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(talk.EXPERIMENTS) + len(talk.COMPARISONS)
