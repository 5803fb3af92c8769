"""CKA against published values, the paper's formulas written out, invariances, and plain loops."""
import numpy as np
import pytest
import torch
from conftest import tiny

from cka import (
    KINDS,
    _center,
    _cka,
    _linear_cka_features,
    _u_center,
    between_layers,
    hidden_states,
    linear_cka,
    rbf_cka,
    rbf_gram,
    sample_level,
    token_level,
)


def debiased(cka):
    return lambda x, y: cka(x, y, debiased=True)


ESTIMATORS = {"linear": linear_cka, "linear_debiased": debiased(linear_cka),
              "rbf": rbf_cka, "rbf_debiased": debiased(rbf_cka)}
ALL = ESTIMATORS | {"unit_debiased": lambda x, y: linear_cka(
    *(torch.nn.functional.normalize(h.double(), dim=-1) for h in (x, y)), debiased=True)}
all_kinds = pytest.mark.parametrize("cka", ESTIMATORS.values(), ids=ESTIMATORS.keys())
linear_kinds = pytest.mark.parametrize("debias", [False, True])


def published():
    """The pair of the CKA notebook of Kornblith et al. (2019)."""
    draw = np.random.RandomState(1337)
    x = draw.randn(100, 10)
    return torch.from_numpy(x), torch.from_numpy(draw.randn(100, 10) + x)


def pair(n=30, d1=6, d2=9, seed=0, layers=()):
    """Related x [*layers, n, d1], y [*layers, n, d2], off centre."""
    generator = torch.Generator().manual_seed(seed)
    x, mix, noise = (torch.randn(*layers, *shape, dtype=torch.float64, generator=generator)
                     for shape in ((n, d1), (d1, d2), (n, d2)))
    return x + 3, x @ mix + noise - 2


def naive_hsic(k, l):
    """Eq. (3): tr(K C L C) with C = I - 11^T/n."""
    n = len(k)
    c = np.eye(n) - np.ones((n, n)) / n
    return np.trace(k @ c @ l @ c)


def naive_unbiased_hsic(k, l):
    """Song et al. (2012), Eq. (5), with the diagonals set to zero."""
    n, one = len(k), np.ones(len(k))
    k, l = k - np.diag(np.diag(k)), l - np.diag(np.diag(l))
    means = (one @ k @ one) * (one @ l @ one) / ((n - 1) * (n - 2))
    return (np.trace(k @ l) + means - 2 / (n - 2) * (one @ k @ l @ one)) / (n * (n - 3))


def naive_cka(hsic, k, l):
    """Eq. (4)."""
    return hsic(k, l) / np.sqrt(hsic(k, k) * hsic(l, l))


def naive_rbf_gram(x, threshold):
    x = x.numpy()
    distance = np.array([[((a - b) ** 2).sum() for b in x] for a in x])
    return np.exp(-distance / (2 * threshold ** 2 * np.median(distance)))


def test_published_values():
    x, y = published()
    assert linear_cka(x, y).item() == pytest.approx(0.55761, abs=1e-5)
    assert rbf_cka(x, y, threshold=0.5).item() == pytest.approx(0.65483, abs=1e-5)
    assert linear_cka(x, y, debiased=True).item() == pytest.approx(0.51346, abs=1e-5)


@pytest.mark.parametrize("d1, d2", [(6, 9), (40, 9), (40, 50)])
def test_equals_equations_3_and_4_written_out(d1, d2):
    """Whichever of the feature and the Gram form linear_cka picks."""
    x, y = pair(d1=d1, d2=d2)
    linear = (x @ x.T).numpy(), (y @ y.T).numpy()
    rbf = naive_rbf_gram(x, 0.7), naive_rbf_gram(y, 0.7)
    for debias, hsic in ((False, naive_hsic), (True, naive_unbiased_hsic)):
        value = linear_cka(x, y, debiased=debias).item()
        assert value == pytest.approx(naive_cka(hsic, *linear), abs=1e-12)
        value = rbf_cka(x, y, threshold=0.7, debiased=debias).item()
        assert value == pytest.approx(naive_cka(hsic, *rbf), abs=1e-12)


@pytest.mark.parametrize("d1, d2", [(6, 9), (40, 9), (40, 50)])
def test_gram_and_feature_forms_agree(d1, d2):
    x, y = (h - h.mean(0) for h in pair(d1=d1, d2=d2))
    assert abs(_cka(x @ x.T, y @ y.T, False) - _linear_cka_features(x, y)) < 1e-10


def test_centering_is_c_k_c_and_u_centering_gives_the_unbiased_hsic():
    x, y = pair(n=8)
    k, l = x @ x.T, y @ y.T
    c = torch.eye(8, dtype=torch.float64) - 1 / 8
    torch.testing.assert_close(_center(k), c @ k @ c)
    expected = 8 * 5 * naive_unbiased_hsic(k.numpy(), l.numpy())  # n (n - 3)
    assert (_u_center(k) * _u_center(l)).sum().item() == pytest.approx(expected, rel=1e-10)
    assert (_u_center(k).diagonal() == 0).all() and _u_center(k).sum(0).abs().max() < 1e-10


@all_kinds
def test_invariant_to_rotation_scale_and_translation_and_to_nothing_more(cka):
    x, y = pair()
    value = cka(x, y).item()
    generator = torch.Generator().manual_seed(1)
    q, _ = torch.linalg.qr(torch.randn(9, 9, dtype=torch.float64, generator=generator))
    for same in (y @ q, 7.5 * y, y + torch.arange(9.0), -0.1 * y @ q - 4):
        assert cka(x, same).item() == pytest.approx(value, abs=1e-9)
    stretched = y * torch.arange(1, 10)  # each dimension by a factor of its own
    assert abs(cka(x, stretched) - value) > 0.01


@all_kinds
def test_one_with_itself_symmetric_and_less_than_one_otherwise(cka):
    x, y = pair()
    assert cka(x, x).item() == pytest.approx(1, abs=1e-12)
    assert cka(x, y).item() == pytest.approx(cka(y, x).item(), abs=1e-12)
    assert 0.1 < cka(x, y) < 0.95


@pytest.mark.parametrize("cka", [linear_cka, rbf_cka])
def test_debiased_is_near_zero_for_independent_data_where_biased_is_near_one(cka):
    """n = 30 rows of d = 1000 independent features."""
    values = []
    for seed in range(5):
        x, y = torch.randn(2, 30, 1000, generator=torch.Generator().manual_seed(seed))
        assert cka(x, y) > 0.9
        values.append(cka(x, y, debiased=True).item())
    assert abs(np.mean(values)) < 0.05 and max(map(abs, values)) < 0.15


@pytest.mark.parametrize("n", [5, 6])
def test_rbf_median_is_over_all_squared_distances_zeros_included(n):
    """For an odd and an even number n^2 of distances; without the diagonal it would be another."""
    x, _ = pair(n=n)
    distance = ((x[:, None] - x[None]) ** 2).sum(-1)
    median = np.median(distance.numpy())
    assert median < np.median(distance[~torch.eye(n, dtype=bool)].numpy())
    for threshold in (0.5, 1.0, 2.0):
        gram = rbf_gram(x @ x.T, threshold)
        expected = torch.exp(-distance / (2 * threshold ** 2 * median))
        torch.testing.assert_close(gram, expected, rtol=1e-10, atol=1e-12)


@linear_kinds
def test_rbf_of_a_large_threshold_is_linear(debias):
    x, y = pair()
    linear = linear_cka(x, y, debias).item()
    assert rbf_cka(x, y, threshold=1e3, debiased=debias).item() == pytest.approx(linear, abs=1e-5)
    assert abs(rbf_cka(x, y, 0.5, debias) - linear) > 1e-3


@all_kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_computed_in_float64_whatever_comes_in(cka, dtype):
    x, y = (h.to(dtype) for h in pair())
    value = cka(x, y)
    assert value.dtype == torch.float64 and value.dim() == 0
    assert value.item() == cka(x.double(), y.double()).item()


@all_kinds
@pytest.mark.parametrize("d", [6, 40])
def test_leading_dimension_equals_a_loop(cka, d):
    x, y = pair(d1=d, layers=(3,))
    together = cka(x, y)
    assert together.shape == (3,)
    alone = torch.stack([cka(a, b) for a, b in zip(x, y)])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-12)


@all_kinds
def test_different_row_counts_are_an_error(cka):
    with pytest.raises(ValueError, match="10 in one, 9 in the other"):
        cka(torch.randn(10, 3), torch.randn(9, 3))


@pytest.mark.parametrize("cka", [linear_cka, rbf_cka])
def test_debiased_needs_four_rows(cka):
    x, y = pair(n=4)
    assert cka(x, y, debiased=True).isfinite()
    with pytest.raises(ValueError, match="at least 4"):
        cka(x[:3], y[:3], debiased=True)
    assert cka(x[:3], y[:3]).isfinite()


# --------------------------------------------------------------------------------------------------
# From hidden states

LENGTHS = (6, 3, 11, 4, 7)


def some_states(seed, related_to=None):
    """As hidden_states gives: per sequence [2 layers, T, 5 features], here of unlike scales."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.tensor([1.0, 3.0])[:, None, None] * torch.tensor([1.0, 2.0, 5.0, 0.1, 1.0])
    states = [torch.randn(2, t, 5, generator=generator) * scale for t in LENGTHS]
    return states if related_to is None else [x + y for x, y in zip(states, related_to)]


def test_token_level_is_the_mean_over_sequences():
    """Sequences count alike, whatever their length; one too short for the debiased is left out."""
    a = some_states(0)
    b = some_states(1, related_to=a)
    result = token_level(a, b)
    assert tuple(result) == KINDS and ALL.keys() == set(KINDS)
    for kind, cka in ALL.items():
        for layer in range(2):
            values = [cka(x[layer], y[layer]).item() for x, y in zip(a, b) if x.size(1) >= 4]
            assert len(values) == 4
            assert result[kind][layer] == pytest.approx(sum(values) / 4, abs=1e-12)
        assert len(result[kind]) == 2 and isinstance(result[kind][0], float)


def test_token_level_leaves_out_what_is_too_short_and_says_so_if_that_is_all():
    """Less its first token, a sequence needs four."""
    short, x = (torch.randn(2, n, 3) for n in (3, 6))
    assert token_level([short, x], [short + 1, 2 * x])["linear_debiased"] == pytest.approx([1, 1])
    with pytest.raises(ValueError, match="at least 5 tokens"):
        token_level([short], [short])


def test_one_token_of_huge_norm_decides_the_plain_kinds_and_not_the_one_of_unit_rows():
    """Two models that share nothing but where their massive activation is."""
    x, y = torch.randn(2, 1, 12, 40, generator=torch.Generator().manual_seed(0))
    x[:, 3], y[:, 3] = 500 * x[:, 3], 500 * y[:, 3]
    found = token_level([x], [y])
    assert found["linear"][0] > 0.95 and abs(found["unit_debiased"][0]) < 0.3
    y = x.clone()
    y[:, 3] = x[:, 3] / 500  # all else is equal: one has lost it
    found = token_level([x], [y])
    assert found["linear_debiased"][0] < 0.5 and found["unit_debiased"][0] == pytest.approx(1)


def test_sample_level_compares_z_scored_last_tokens():
    a = some_states(0)
    b = some_states(1, related_to=a)
    result = sample_level(a, b)
    assert tuple(result) == KINDS
    for layer in range(2):
        # [5 sequences, 5 features] each
        last = [np.array([h[layer, -1].double().tolist() for h in states]) for states in (a, b)]
        x, y = (torch.from_numpy((h - h.mean(0)) / h.std(0, ddof=1)) for h in last)
        for kind, cka in ALL.items():
            assert result[kind][layer] == pytest.approx(cka(x, y).item(), abs=1e-10)
            as_they_are = cka(*map(torch.from_numpy, last))
            assert abs(result[kind][layer] - as_they_are) > 1e-3, "z-scoring matters"


def test_between_layers_is_the_sample_level_of_each_pair():
    a = some_states(0)
    b = some_states(1, related_to=a)
    found = torch.tensor(between_layers(a, b))
    assert found.shape == (2, 2)
    assert found.diagonal().tolist() == pytest.approx(sample_level(a, b)["linear_debiased"])
    swapped = [h.flip(0) for h in b]
    assert [found[0, 1], found[1, 0]] == pytest.approx(sample_level(a, swapped)["linear_debiased"])


def test_sample_level_survives_a_dimension_that_never_changes():
    """It counts for nothing."""
    a = some_states(0)
    b = some_states(1, related_to=a)
    expected = sample_level(a, b)
    constant = [torch.cat([x, torch.full_like(x[..., :1], 2.5)], dim=-1) for x in a]
    for kind, values in sample_level(constant, b).items():
        assert values == pytest.approx(expected[kind], abs=1e-12)


def deep(seed):
    """A tiny model of three layers."""
    return tiny(seed, n_layer=3)


def sequences():
    generator = torch.Generator().manual_seed(0)
    return [*torch.randint(64, (6, 12), generator=generator).tolist(), [1, 2, 3, 4, 5]]


def test_hidden_states_are_every_block_output_without_the_first_token():
    model = deep(0)
    states = hidden_states(model, sequences())
    assert [x.shape for x in states] == [(3, 11, 32)] * 6 + [(3, 4, 32)]
    outputs = []

    def keep(module, args, out):
        outputs.append(out.detach())
    for module in [*model.layers, model.norm]:
        module.register_forward_hook(keep)
    for ids, x in zip(sequences(), states):
        outputs.clear()
        model(torch.tensor([ids]))
        del outputs[2]  # the last block counts after the final norm
        torch.testing.assert_close(x, torch.cat(outputs)[:, 1:], rtol=1e-5, atol=1e-5)
        assert not x.requires_grad and x.dtype == torch.float32


def test_hidden_states_keep_the_models_type_and_cka_is_that_of_their_values():
    a, b = (hidden_states(deep(seed).bfloat16(), sequences()) for seed in (0, 1))
    assert all(x.dtype == torch.bfloat16 for x in a)
    as_floats = [[x.float() for x in states] for states in (a, b)]
    for level in (token_level, sample_level):
        assert level(a, b) == level(*as_floats)


def test_hidden_states_of_many_sequences_say_how_many_were_read():
    model, many, read = deep(0), sequences() * 3, []
    states = hidden_states(model, many, done=read.append)
    assert read == [8, 8, 5] and len(states) == 21
    for x, last in zip(states, hidden_states(model, many, last=True)):
        torch.testing.assert_close(last, x[:, -1:], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("level", [token_level, sample_level])
def test_identical_models_give_one_on_every_layer_and_others_less(level):
    same = level(*[hidden_states(deep(0), sequences()) for _ in range(2)])
    for kind in KINDS:
        assert same[kind] == pytest.approx([1, 1, 1], abs=1e-9)
    other = level(hidden_states(deep(0), sequences()), hidden_states(deep(1), sequences()))
    assert all(value < 0.95 for value in [*other["linear_debiased"], *other["rbf_debiased"]])
