"""The tests of similar inputs, on tiny models, against direct computation."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fallow
from fallow.calibration.calibrator import Calibrator
from fallow.checkpoints.text import load_text
from fallow.common.errors import FallowError, UsageError
from fallow.patterns import similarity
from fallow.patterns.similarity import (
    agreement,
    edit,
    edit_test,
    jaccard,
    published_test,
    read_samples,
    recording,
)
from fallow.patterns.store import pack_bits
from fallow.plan import Plan

Texts = tuple[Path, Path]


@pytest.fixture(scope="module")
def plan(calibrators: dict[str, Calibrator]) -> Plan:
    return calibrators["llama"].plan("topk", sparsity=0.5, measure=False)


def test_a_tap_that_the_model_lacks(
    tiny: dict[str, fallow.Model], texts: Texts, plan: Plan
) -> None:
    with pytest.raises(UsageError, match="unknown tap 'x'; this model has gate_pre"):
        edit_test(tiny["llama"], plan, texts[1], tap="x", documents=2, context=32)


def test_agreement_and_jaccard() -> None:
    x = np.array([[1, 1, 0, 0, 1], [0, 0, 0, 0, 0]], dtype=bool)
    y = np.array([[1, 0, 0, 1, 1], [0, 0, 0, 0, 0]], dtype=bool)
    np.testing.assert_allclose(agreement(pack_bits(x), pack_bits(y), 5), [3 / 5, 1])
    np.testing.assert_allclose(jaccard(pack_bits(x), pack_bits(y)), [2 / 4, 1])


@given(
    st.integers(8, 80),
    st.floats(0.01, 0.9),
    st.sampled_from(similarity.KINDS),
    st.integers(0, 2**32 - 1),
)
@settings(max_examples=60, deadline=None)
def test_edits_keep_the_other_tokens(n: int, share: float, kind: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, 50, n)
    found = edit(ids, share, kind, np.arange(50), rng)
    count = max(1, round(share * n))
    assert len(found.ids) == (n - count if kind == "delete" else n)
    assert found.ids[0] == ids[0]
    before, after = found.pairs["before"], found.pairs["after"]
    for pairs in (before, after):
        np.testing.assert_array_equal(ids[pairs[:, 0]], found.ids[pairs[:, 1]])
    np.testing.assert_array_equal(before[:, 0], before[:, 1])  # all that causes them is the same
    np.testing.assert_array_equal(before[:, 0], np.arange(len(before)))
    edited = found.pairs["edited"]
    assert len(edited) == (count if kind == "substitute" else 0)
    assert (ids[edited[:, 0]] != found.ids[edited[:, 1]]).all()
    if kind == "insert":
        assert len(before) + len(after) >= n - count
    else:
        assert len(before) + len(after) == n - count


def test_one_document_has_no_interval(
    tiny: dict[str, fallow.Model], plan: Plan, texts: Texts
) -> None:
    """With these places drawn only one of the two has an unedited token behind its first edit."""
    report = edit_test(
        tiny["llama"], plan, texts[1], documents=2, context=8, shares=(0.75,), kind="delete"
    )
    before, after = report.rows
    assert (before.agreement_interval, before.jaccard_interval) == ([0.0, 0.0], [0.0, 0.0])
    assert (after.agreement_interval, after.jaccard_interval) == (None, None)


@pytest.mark.parametrize("kind", similarity.KINDS)
def test_edit_test(kind: str, tiny: dict[str, fallow.Model], plan: Plan, texts: Texts) -> None:
    report = edit_test(
        tiny["llama"], plan, texts[1], documents=5, context=64, shares=(0.05, 0.3), kind=kind
    )
    by_stratum = {(r.edited, r.stratum): r for r in report.rows}
    strata = similarity.STRATA if kind == "substitute" else ("before", "after")
    assert list(by_stratum) == [(share, s) for share in (0.05, 0.3) for s in strata]
    for share in (0.05, 0.3):
        assert by_stratum[share, "before"].agreement == [1.0, 1.0]  # the self-check
        assert by_stratum[share, "before"].kappa_frequency == [1.0, 1.0]
        after = by_stratum[share, "after"]
        assert all(0.5 < a < 1 for a in after.agreement)
        assert after.agreement_interval is not None
        assert all(i > 0 for i in after.agreement_interval)
        for a, base, kappa in zip(
            after.agreement, report.unrelated_agreement, after.kappa_unrelated, strict=True
        ):
            assert kappa == pytest.approx((a - base) / (1 - base))
    few, many = (np.mean(by_stratum[share, "after"].agreement) for share in (0.05, 0.3))
    assert many < few
    if kind == "substitute":
        edited = by_stratum[0.05, "edited"].agreement
        assert np.mean(edited) < np.mean(by_stratum[0.05, "after"].agreement)


def test_baselines(tiny: dict[str, fallow.Model], plan: Plan, texts: Texts) -> None:
    model = tiny["llama"]
    report = edit_test(model, plan, texts[1], documents=6, context=64, shares=(0.1,))
    windows = model.windows(load_text(texts[1], "evaluation"), 64, 6)
    seen: list[torch.Tensor] = []
    from fallow.models.taps import attach

    def keep(layer: int, inter: torch.Tensor) -> None:
        if layer == 1:
            seen.append(inter != 0)

    with model.sparse(plan), attach(model.layers, {"inter": keep}):
        for window in windows:
            model.hidden(window[None])
    active = torch.cat(seen).numpy()
    rate = active.mean(axis=0)
    assert report.frequency_agreement[1] == pytest.approx((rate**2 + (1 - rate) ** 2).mean())
    pairs = [
        (active[i] == active[j]).mean()
        for i in range(0, len(active), 7)
        for j in range(0, len(active), 5)
        if i // 64 != j // 64
    ]
    assert report.unrelated_agreement[1] == pytest.approx(np.mean(pairs), abs=0.02)
    static = np.argsort(-rate, kind="stable")[: round(rate.sum())]
    mask = np.isin(np.arange(37), static)
    assert report.static_agreement[1] == pytest.approx((active == mask).mean(), abs=0.03)


def test_recording_is_the_model_under_the_plan(tiny: dict[str, fallow.Model], plan: Plan) -> None:
    ids = np.arange(2, 34)
    with recording(tiny["llama"], plan, "inter") as patterns:
        first, again = patterns(ids), patterns(ids[:20])
    for a, b in zip(first, again, strict=True):
        np.testing.assert_array_equal(a[:20], b)  # causal
        assert a.shape == (32, 8)


SAMPLE = '''
    paragraphMain = """
one two three four five six seven eight nine ten"""

paragraph90 = """
one two three four five six seven eight other words"""
stray text between them
paragraph80 = """one two three four five six seven eight nine ten"""
paragraph80 = """one two three four five six seven eight nine ten."""
'''


def test_published_test(tiny: dict[str, fallow.Model], plan: Plan, tmp_path: Path) -> None:
    (tmp_path / "paragraph1.txt").write_text(SAMPLE)
    (tmp_path / "paragraph10.txt").write_text('paragraphMain = """a b c d"""')
    samples = read_samples(tmp_path)
    assert list(samples) == ["1", "10"]
    assert samples["1"]["80"].endswith("ten.")  # the later of two
    first, second = published_test(tiny["llama"], plan, tmp_path, tap="inter")
    assert (first.variant, second.variant) == ("90", "80")
    # A shared prefix agrees by construction, whatever lies behind it.
    assert first.prefix == [1.0, 1.0]
    assert first.best_shift == 0
    assert first.behind is not None
    assert max(first.behind) < 1
    assert first.row_by_row[0] < 1
    # A missing newline in front moves all rows: low row by row, high after a shift.
    assert (second.prefix_tokens, second.prefix) == (0, None)
    assert second.best_shift == -1
    assert min(second.shifted) > max(second.row_by_row)
    assert second.aligned is not None
    assert second.unedited_share > 0.9


def test_bad_requests(
    tiny: dict[str, fallow.Model],
    plan: Plan,
    calibrators: dict[str, Calibrator],
    texts: Texts,
    tmp_path: Path,
) -> None:
    model = tiny["llama"]
    with pytest.raises(UsageError, match="too few; give at least 2"):
        edit_test(model, plan, texts[1], documents=1)
    with pytest.raises(UsageError, match=r"share 1 of edits is outside \(0, 1\)"):
        edit_test(model, plan, texts[1], shares=(1.0,))
    with pytest.raises(UsageError, match="unknown edit 'swap'; known: substitute"):
        edit_test(model, plan, texts[1], kind="swap")
    with pytest.raises(FallowError, match=r"no texts paragraph1\.txt"):
        published_test(model, plan, tmp_path)
    with pytest.raises(FallowError, match="calibrate a plan for"):
        edit_test(tiny["qwen2"], plan, texts[1], context=64)


def test_figure(tiny: dict[str, fallow.Model], plan: Plan, texts: Texts, tmp_path: Path) -> None:
    report = edit_test(tiny["llama"], plan, texts[1], documents=2, context=64, shares=(0.1, 0.2))
    similarity.draw(report, tmp_path / "f.png")
    assert (tmp_path / "f.png").stat().st_size > 5000


# The command -------------------------------------------------------------------------------------


def test_command(folders: dict[str, Path], texts: Texts, tmp_path: Path, run: Any) -> None:
    options = ["--calibration-text", texts[0], "--text", texts[1], "--documents", 3]
    command = ["patterns", "similarity", folders["llama"], "-o", tmp_path / "s", "--context", 64]
    found = run(*command, *options, "--json")
    assert found.code == 0
    assert found.json["rows"][0]["agreement"] == [1.0, 1.0]
    assert {p.name for p in (tmp_path / "s").iterdir()} == {"similarity.json", "similarity.png"}
    assert "unrelated tokens agree" in run(*command, *options).out
    (tmp_path / "paragraph1.txt").write_text(
        'paragraphMain = """the gate lets them"""\nparagraph95 = """the gate lets one"""'
    )
    published = [*command, "--published", tmp_path, "--calibration-text", texts[0]]
    (tmp_path / "s" / "similarity.png").unlink()
    assert run(*published, "--json").json["variants"][0]["prefix"] == [1.0, 1.0]
    assert "row by row" in run(*published).out
    assert (tmp_path / "s" / "similarity.png").read_bytes().startswith(b"\x89PNG")
    assert run(*command, *options, "--kind", "swap").code == 2
