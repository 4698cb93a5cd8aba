"""SDA's losses against their equations, written out once more with loops over Python floats."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from vlm2rec.embedder.contract.errors import ConfigError
from vlm2rec.embedder.options import Alignment
from vlm2rec.embedder.training.sda import ItemAlignment, cmsa, cmsa_reference, grouped_means, infonce_reference

Rows = list[list[float]]


def drawn(n: int = 5, d: int = 3, spread: float = 1.0) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(0)
    image, text = spread * torch.randn(2, n, d, generator=random, dtype=torch.float64)
    return image, text


def products(a: Rows, b: Rows) -> Rows:
    return [[math.fsum(p * q for p, q in zip(x, y, strict=True)) for y in b] for x in a]


def unit_rows(vectors: Tensor) -> Rows:
    return [[v / math.hypot(*row) for v in row] for row in vectors.tolist()]


def softmax(row: list[float]) -> list[float]:
    total = math.fsum(math.exp(v) for v in row)
    return [math.exp(v) / total for v in row]


def turned(rows: Rows) -> Rows:
    return [list(column) for column in zip(*rows, strict=True)]


def test_cmsa_is_the_mean_divergence_of_both_directions_from_the_teacher() -> None:
    image, text = drawn()
    tau, n = 0.3, 5
    x, y = unit_rows(image), unit_rows(text)
    student = [[v / tau for v in row] for row in products(x, y)]
    xx, yy = products(x, x), products(y, y)
    teacher = [softmax([(xx[i][j] + yy[i][j]) / (2 * tau) for j in range(n)]) for i in range(n)]
    found = 0.0
    for direction in (student, turned(student)):
        for t, p in zip(teacher, map(softmax, direction), strict=True):
            found += 0.5 * math.fsum(a * math.log(a / b) for a, b in zip(t, p, strict=True)) / n
    assert float(cmsa(image, text, tau)) == pytest.approx(found, rel=1e-12)


def test_cmsa_does_not_look_at_lengths_and_is_nothing_where_text_and_image_agree() -> None:
    image, text = drawn()
    assert float(cmsa(7 * image, text, 0.1)) == pytest.approx(float(cmsa(image, text, 0.1)), rel=1e-12)
    assert float(cmsa(image, 2 * image, 0.1)) == pytest.approx(0.0, abs=1e-14)
    assert float(cmsa(image[:1], text[:1], 0.1)) == 0.0, "a single item has nothing to be told from"


def test_the_teacher_of_cmsa_is_held_constant() -> None:
    image, text = drawn()
    image.requires_grad_()
    cmsa(image, text, 0.3).backward()
    x, y = (torch.nn.functional.normalize(v) for v in (image, text))
    with torch.no_grad():
        teacher = ((x @ x.T + y @ y.T) / 0.6).softmax(1)
    student = x @ y.T / 0.3
    entropies = [-(teacher * s.log_softmax(1)).sum(1).mean() for s in (student, student.T)]
    (expected,) = torch.autograd.grad(0.5 * (entropies[0] + entropies[1]), image)
    assert image.grad is not None
    torch.testing.assert_close(image.grad, expected)


def test_the_reference_keeps_lengths_and_the_transposed_teacher_as_it_is() -> None:
    image, text = drawn(spread=0.7)
    tau, n = 3.0, 5
    x, y = image.tolist(), text.tolist()
    student = [[v / tau for v in row] for row in products(x, y)]
    xx, yy = products(x, x), products(y, y)
    teacher = [softmax([tau * (xx[i][j] + yy[i][j]) / 2 for j in range(n)]) for i in range(n)]
    found = 0.0
    for rows, direction in ((teacher, student), (turned(teacher), turned(student))):
        for t, p in zip(rows, map(softmax, direction), strict=True):
            found -= 0.5 * math.fsum(a * math.log(b) for a, b in zip(t, p, strict=True)) / n
    assert float(cmsa_reference(image, text, torch.tensor(tau, dtype=torch.float64))) == pytest.approx(found, rel=1e-12)
    assert any(abs(math.fsum(row) - 1) > 0.01 for row in turned(teacher))


def test_the_reference_averages_wide_vectors_in_groups_to_768() -> None:
    image, text = drawn(4, 1536, spread=0.1)
    narrow = [v.unflatten(1, (768, 2)).mean(2) for v in (image, text)]
    tau = torch.tensor(3.0, dtype=torch.float64)
    assert float(cmsa_reference(image, text, tau)) == pytest.approx(float(cmsa_reference(*narrow, tau)), rel=1e-12)


def test_the_groups_of_the_reference_are_those_of_its_code() -> None:
    """1024 numbers become 256 means of four, the other 2560 become 512 means of five; worked out one by one."""
    vectors = torch.randn(2, 3584, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = grouped_means(vectors)
    assert found.shape == (2, 768)
    for row, mine in zip(vectors.tolist(), found.tolist(), strict=True):
        means = [math.fsum(row[4 * i : 4 * i + 4]) / 4 for i in range(256)]
        means += [math.fsum(row[1024 + 5 * i : 1024 + 5 * i + 5]) / 5 for i in range(512)]
        assert mine == pytest.approx(means, rel=1e-12)


@pytest.mark.parametrize(
    ("width", "sizes"),
    [
        (1, {1: 1}),
        (767, {1: 767}),
        (768, {1: 768}),
        (1024, {1: 512, 2: 256}),
        (1536, {2: 768}),
        (2048, {2: 256, 3: 512}),
        (3584, {4: 256, 5: 512}),
        (4096, {5: 512, 6: 256}),
        (769, {1: 767, 2: 1}),
    ],
)
def test_any_width_is_averaged_in_groups_that_differ_by_one_at_most(width: int, sizes: dict[int, int]) -> None:
    """The sum of the means weighted by the groups' sizes is the sum of the vector: each number is in one group."""
    expected = [size for size, count in sorted(sizes.items()) for _ in range(count)]
    numbers = torch.arange(float(width), dtype=torch.float64)[None]
    starts = [sum(expected[:i]) for i in range(len(expected))]
    means = [start + (size - 1) / 2 for start, size in zip(starts, expected, strict=True)]
    assert grouped_means(numbers)[0].tolist() == pytest.approx(means) and sum(expected) == width


def test_the_ablation_of_the_reference_is_infonce_of_unit_vectors_with_a_learned_temperature() -> None:
    image, text = drawn(4, 900)
    x, y = (unit_rows(grouped_means(v)) for v in (image, text))
    for tau in (3.0, 0.2):
        student = [[v / tau for v in row] for row in products(x, y)]
        expected = 0.0
        for direction in (student, turned(student)):
            expected -= 0.5 * math.fsum(math.log(softmax(row)[i]) for i, row in enumerate(direction)) / 4
        learned = torch.tensor(tau, dtype=torch.float64, requires_grad=True)
        found = infonce_reference(image, text, learned)
        assert float(found.detach()) == pytest.approx(expected, rel=1e-12)
        assert torch.autograd.gradcheck(lambda t: infonce_reference(image, text, t), (learned,))


def test_the_teacher_of_the_reference_has_a_gradient() -> None:
    image, text = drawn()
    tau = torch.tensor(3.0, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda i, t: cmsa_reference(i, t, tau), (image.requires_grad_(), text))
    with pytest.raises(RuntimeError, match="Jacobian mismatch"):
        torch.autograd.gradcheck(lambda i, t: cmsa(i, t, 0.3), (image, text))


@pytest.mark.parametrize("kind", ["reference", "reference-off"])
def test_only_the_reference_learns_its_temperature_and_starts_at_three(kind: Alignment) -> None:
    learned = ItemAlignment(kind)
    assert [(name, p.item()) for name, p in learned.named_parameters()] == [("tau", 3.0)]
    learned(*(v.float() for v in drawn())).backward()
    assert learned.tau.grad is not None and float(learned.tau.grad) != 0
    for fixed in ("paper", "off"):
        loss = ItemAlignment(fixed)
        assert list(loss.parameters()) == [] and float(loss.tau) == pytest.approx(0.02)
    assert float(ItemAlignment("paper", 0.5).tau) == 0.5


def test_without_soft_target_it_is_infonce_in_both_directions() -> None:
    same = torch.ones(4, 3)
    assert float(ItemAlignment("off")(same, same)) == pytest.approx(math.log(4))
    image, text = drawn()
    x, y = (torch.nn.functional.normalize(v) for v in (image, text))
    own = torch.arange(5)
    logits = x @ y.T / 0.02
    entropy = torch.nn.functional.cross_entropy
    expected = 0.5 * (entropy(logits, own) + entropy(logits.T, own))
    assert float(ItemAlignment("off")(image, text)) == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.parametrize("tau", [0.0, -1.0, math.inf, math.nan])
def test_a_temperature_that_is_none_is_refused(tau: float) -> None:
    with pytest.raises(ConfigError, match="tau_cmsa"):
        ItemAlignment("paper", tau)


def test_half_precision_is_widened_before_anything_is_compared() -> None:
    image, text = (v.bfloat16() for v in drawn())
    for kind in ("paper", "reference", "off", "reference-off"):
        loss = ItemAlignment(kind)
        assert loss(image, text).dtype == torch.float32
        assert float(loss(image, text).detach()) == float(loss(image.float(), text.float()).detach())
