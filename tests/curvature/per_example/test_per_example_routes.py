"""Layers and ways to use parameters: which route each takes, and that it is right or refused."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from curvature import Objective
from curvature.errors import DataError, InputError
from curvature.per_example import GradientMoments, batch, gradient_moments, gradient_norms, per_example_gradients
from curvature.per_example.cutting import layouts_of_uses
from curvature.per_example.forms import Factors
from curvature.per_example.layout import Layout
from curvature.per_example.row_order import follows
from tests.checks import assert_close, assert_untouched
from tests.references import flat_gradient, twice_differentiable_attention

EXACT = 1e-10
N = 5
TOKENS = torch.tensor([[0, 3, 1, 1], [2, 2, 2, 0], [1, 0, 3, 2], [3, 3, 0, 0], [0, 1, 2, 3]])


def real(*shape: int) -> Tensor:
    return torch.randn(N, *shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def check(model: nn.Module, x: Tensor, *, route: str = "auto", pairwise: bool = True) -> GradientMoments:
    """Compare moments with one backward pass an example; the loss is the mean over logits of their squared logistic."""
    model = model.double()
    with torch.no_grad():
        targets = torch.randn_like(model(x))
    objective = Objective(model, nn.MSELoss(), (x, targets))
    with twice_differentiable_attention():
        rows = torch.stack(
            [
                flat_gradient(F.mse_loss(model(x)[i], targets[i]), [p for p in model.parameters() if p.requires_grad])
                for i in range(N)
            ]
        )
    with assert_untouched(model):
        moments = gradient_moments(objective, pairwise=pairwise, along_mean=True, route=route)  # type: ignore[arg-type]
    assert moments.squared_norms is not None
    assert moments.along_mean is not None
    assert_close(moments.mean, rows.mean(0), EXACT)
    assert_close(moments.second_moment, rows.square().mean(0), EXACT)
    assert_close(moments.squared_norms, rows.square().sum(1), EXACT)
    assert_close(moments.along_mean, rows @ rows.mean(0), EXACT)
    if moments.dots is not None:
        assert_close(moments.dots, rows @ rows.T, EXACT)
    halves = Objective(model, nn.MSELoss(), [(x[:2], targets[:2]), (x[2:], targets[2:])])  # the mean comes too late
    with assert_untouched(model):
        found_norms = gradient_norms(halves, along_mean=True, route=route)  # type: ignore[arg-type]
    assert found_norms.along_mean is not None
    assert_close(found_norms.along_mean, rows @ rows.mean(0), EXACT)
    with assert_untouched(model):
        norms = gradient_norms(objective, route=route).squared_norms  # type: ignore[arg-type]
    assert norms is not None
    assert_close(norms, rows.square().sum(1), EXACT)
    found = torch.cat([rows for _, rows in per_example_gradients(objective, chunk_size=2)])
    assert_close(found, rows, EXACT)
    return moments


def kinds(moments: GradientMoments) -> set[str]:
    return {route.partition(":")[0] for route in moments.routes.values()}


# -- layers -----------------------------------------------------------------------------------------------------------

LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear without bias": (lambda: nn.Linear(4, 3, bias=False), (4,)),
    "linear over tokens": (lambda: nn.Linear(4, 3), (5, 4)),
    "wide linear over tokens": (lambda: nn.Linear(40, 30), (2, 40)),
    "linear over a grid": (lambda: nn.Linear(4, 3), (2, 3, 4)),
    "one output": (lambda: nn.Linear(4, 1), (4,)),
    "conv1d": (lambda: nn.Conv1d(3, 4, 3, stride=2, padding=1, dilation=2), (3, 9)),
    "conv2d": (lambda: nn.Conv2d(2, 4, (3, 2), stride=(1, 2), padding=(2, 1)), (2, 5, 6)),
    "conv2d grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2, dilation=2, padding=2), (4, 5, 5)),
    "conv2d depthwise": (lambda: nn.Conv2d(3, 6, 3, groups=3, bias=False), (3, 5, 5)),
    "conv2d same": (lambda: nn.Conv2d(2, 3, (4, 3), padding="same", dilation=(1, 2)), (2, 6, 6)),
    "conv2d valid": (lambda: nn.Conv2d(2, 3, 2, padding="valid"), (2, 3, 3)),
    "conv2d circular": (lambda: nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"), (2, 4, 4)),
    "transposed conv1d": (lambda: nn.ConvTranspose1d(2, 3, 3, stride=2, output_padding=1), (2, 4)),
    "transposed conv2d": (lambda: nn.ConvTranspose2d(4, 6, 3, 2, 1, groups=2, dilation=(1, 2)), (4, 3, 3)),
    "conv2d of one window": (lambda: nn.Conv2d(2, 3, 3), (2, 3, 3)),
    "conv3d": (lambda: nn.Conv3d(2, 3, (2, 3, 2), stride=(1, 2, 1), padding=(0, 1, 1)), (2, 3, 5, 4)),
    "layer norm": (lambda: nn.LayerNorm(4), (4,)),
    "layer norm over tokens": (lambda: nn.LayerNorm((3, 4), eps=1e-2), (2, 3, 4)),
    "layer norm without bias": (lambda: nn.LayerNorm(4, bias=False), (3, 4)),
    "RMS norm": (lambda: nn.RMSNorm(4), (3, 4)),
    "RMS norm with eps": (lambda: nn.RMSNorm(4, eps=0.1), (3, 4)),
    "group norm": (lambda: nn.GroupNorm(2, 4, eps=1e-2), (4, 3, 2)),
    "group norm of vectors": (lambda: nn.GroupNorm(2, 4), (4,)),
    "instance norm": (lambda: nn.InstanceNorm1d(3, affine=True), (3, 5)),
    "batch norm": (lambda: nn.BatchNorm2d(3).eval(), (3, 2, 2)),
    "batch norm of vectors": (lambda: nn.BatchNorm1d(3).eval(), (3,)),
}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("name", LAYERS)
def test_layer(name: str) -> None:
    build, shape = LAYERS[name]
    moments = check(build(), real(*shape), route="rules")
    assert kinds(moments) <= {"ghost", "factorised", "direct"}


@pytest.mark.parametrize("name", ["conv3d", "conv2d grouped", "linear over tokens", "RMS norm"])
def test_layers_that_follow_others(name: str) -> None:
    """Gradients that come back are no longer contiguous, and activations are overwritten in place."""
    build, shape = LAYERS[name]
    body = nn.Sequential(build(), nn.ReLU(inplace=True), nn.Flatten())
    width = body.double()(real(*shape)).shape[1]
    check(nn.Sequential(body, nn.Linear(width, 3), nn.SiLU(inplace=True)), real(*shape), route="rules")


def test_embedding() -> None:
    moments = check(nn.Embedding(6, 3, padding_idx=2), TOKENS, route="rules")
    assert moments.routes == {"weight": "indexed"}
    assert moments.squared_norms is not None
    assert moments.mean.view(6, 3)[2].tolist() == [0, 0, 0]
    check(nn.Embedding(6, 3, padding_idx=-6), TOKENS, route="rules")


def test_gradients_that_embeddings_scale_by_frequency_are_not_scaled() -> None:
    """They would depend on the other examples, and be derivatives of nothing."""
    scaled, plain = nn.Embedding(4, 3, scale_grad_by_freq=True), nn.Embedding(4, 3)
    plain.load_state_dict(scaled.state_dict())
    moments = [gradient_moments(Objective(m, nn.MSELoss(), (TOKENS, real(4, 3).float()))) for m in (scaled, plain)]
    assert_close(moments[0].mean, moments[1].mean)
    assert moments[0].squared_norms is not None
    assert moments[1].squared_norms is not None
    assert_close(moments[0].squared_norms, moments[1].squared_norms)
    assert moments[0].routes == {"weight": "indexed"}


def test_cheaper_form_is_taken() -> None:
    few = check(nn.Linear(40, 30, bias=False), real(2, 40))
    many = check(nn.Linear(4, 3, bias=False), real(9, 4))
    assert few.routes["weight"] == "ghost"
    assert many.routes["weight"] == "factorised"


# -- ways to use a parameter ------------------------------------------------------------------------------------------


class Own(nn.Module):
    """Parameters that belong to a container, used by a function that is handed in."""

    def __init__(self, use: Callable[[Own, Tensor], Tensor], **shapes: tuple[int, ...]) -> None:
        super().__init__()
        for name, shape in shapes.items():
            setattr(self, name, nn.Parameter(torch.randn(shape)))
        self.use = use

    def forward(self, x: Tensor) -> Tensor:
        return self.use(self, x)


BY_RULES: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "positions": (lambda: Own(lambda m, x: (x + m.p).tanh(), p=(3, 4)), real(3, 4)),
    "positions with a leading one": (lambda: Own(lambda m, x: (m.p + x).tanh(), p=(1, 3, 4)), real(3, 4)),
    "some of the positions": (lambda: Own(lambda m, x: (x + m.p[:, :3]).tanh(), p=(1, 6, 4)), real(3, 4)),
    "one position twice": (lambda: Own(lambda m, x: (x + m.p[[0, 0, 1]]).tanh(), p=(2, 4)), real(3, 4)),
    "expanded positions": (lambda: Own(lambda m, x: (x + m.p.expand(len(x), -1, -1)).tanh(), p=(1, 3, 4)), real(3, 4)),
    "positions in place": (lambda: Own(lambda m, x: x.clone().add_(m.p).tanh(), p=(3, 4)), real(3, 4)),
    "gain and shift": (lambda: Own(lambda m, x: x.tanh() * m.g + m.s, g=(4,), s=(1,)), real(3, 4)),
    "scalar": (lambda: Own(lambda m, x: m.g * x.sin(), g=()), real(3)),
    "class token": (
        lambda: Own(lambda m, x: torch.cat([m.c.expand(len(x), -1, -1), x], dim=1).sin() @ m.w, c=(1, 1, 4), w=(4, 2)),
        real(3, 4),
    ),
    "class token, repeated": (
        lambda: Own(lambda m, x: torch.cat((m.c.repeat(len(x), 1, 1), x), 1).sin() @ m.w, c=(1, 2, 4), w=(4, 2)),
        real(3, 4),
    ),
    "matmul": (lambda: Own(lambda m, x: (x @ m.w).tanh() @ m.w.T, w=(4, 3)), real(2, 4)),
    "transposed linear": (lambda: Own(lambda m, x: F.linear(F.linear(x, m.w).tanh(), m.w.t()), w=(3, 4)), real(4)),
    "addmm": (lambda: Own(lambda m, x: torch.addmm(m.b, x, m.w).tanh(), w=(4, 3), b=(3,)), real(4)),
    "rows of a matrix": (
        lambda: Own(
            lambda m, x: F.linear(x, m.w[:2]).tanh() * F.linear(x, m.w.chunk(2)[1]) + x @ m.w.mT[:, 1:3], w=(4, 4)
        ),
        real(3, 4),
    ),
    "row of a matrix": (lambda: Own(lambda m, x: (x + m.w[1] + m.w.select(1, 0)).tanh(), w=(4, 4)), real(4)),
    "flattened tokens": (
        lambda: Own(lambda m, x: (x.flatten(0, 1) @ m.w + m.b).tanh().view(len(x), -1), w=(4, 3), b=(3,)),
        real(6, 4),
    ),
    "time first": (
        lambda: Own(
            lambda m, x: ((x.transpose(0, 1) @ m.w + m.b) * m.g).tanh().transpose(0, 1), w=(4, 3), b=(3,), g=(6, 1, 1)
        ),
        real(6, 4),
    ),
    "as many tokens as examples, time first": (
        lambda: Own(
            lambda m, x: (x.transpose(0, 1) @ m.w + m.b).cumsum(0).tanh().transpose(0, 1), w=(4, 3), b=(N, 1, 3)
        ),
        real(N, 4),
    ),
    "tokens of all examples in turn": (
        lambda: Own(
            lambda m, x: F.linear(x.transpose(0, 1).flatten(0, 1), m.w).view(-1, len(x), 3).transpose(0, 1).sin(),
            w=(3, 4),
        ),
        real(6, 4),
    ),
    "MultiheadAttention, time first": (
        lambda: Own(
            lambda m, x: m.attention(x.transpose(0, 1), x.transpose(0, 1), x.transpose(0, 1))[0].transpose(0, 1)
        ),
        real(3, 4),
    ),
    "cross attention": (lambda: Own(lambda m, x: m.attention(x[:, :2], x, x.cos())[0]), real(3, 4)),
}


@pytest.mark.parametrize("name", BY_RULES)
def test_use_that_rules_know(name: str) -> None:
    build, x = BY_RULES[name]
    model = build()
    if "ttention" in name:
        model.attention = nn.MultiheadAttention(4, 2, batch_first="cross" in name)
    check(model, x, route="rules")


class Decoder(nn.Module):
    """Learned positions and a head tied to the embedding: what other libraries get wrong without notice."""

    def __init__(self, *, tied: bool, lookup: bool = False, vocabulary: int = 4) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, 6)
        self.norm, self.mix = nn.LayerNorm(6), nn.Linear(6, 6)
        self.head = nn.Linear(6, vocabulary, bias=False)
        if tied:
            self.head.weight = self.tokens.weight
        self.positions = nn.Embedding(8, 6) if lookup else nn.Parameter(torch.randn(8, 6))

    def forward(self, tokens: Tensor) -> Tensor:
        T = tokens.shape[1]
        places = self.positions[:T] if isinstance(self.positions, nn.Parameter) else self.positions(torch.arange(T))
        x = self.tokens(tokens) + places
        return self.head(self.norm(x + self.mix(x).tanh()))


@pytest.mark.parametrize("vocabulary", [4, 200])
@pytest.mark.parametrize("lookup", [False, True], ids=["container's own", "looked up"])
@pytest.mark.parametrize("tied", [False, True])
def test_decoder(tied: bool, lookup: bool, vocabulary: int) -> None:
    moments = check(Decoder(tied=tied, lookup=lookup, vocabulary=vocabulary), TOKENS, route="rules")
    assert moments.routes["positions.weight" if lookup else "positions"] == "direct"


def test_as_many_places_as_examples_looked_up() -> None:
    check(Decoder(tied=True, lookup=True), torch.cat([TOKENS, TOKENS[:, :1]], dim=1), route="rules")


def test_module_used_twice_and_frozen_parameters() -> None:
    layer = nn.Linear(4, 4)
    model = nn.Sequential(layer, nn.Tanh(), layer, nn.LayerNorm(4), nn.Linear(4, 2))
    model[4].bias.requires_grad_(False)
    moments = check(model, real(3, 4), route="rules")
    assert "4.bias" not in moments.routes


def test_chosen_parameters() -> None:
    model, x = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)).double(), real(4)
    y = real(2)
    whole = gradient_moments(Objective(model, nn.MSELoss(), (x, y)))
    part = gradient_moments(Objective(model, nn.MSELoss(), (x, y), params="2.*"))
    assert_close(part.variance, whole.blocks[1].take(whole.variance), EXACT)
    assert whole.layer_squared_norms is not None
    assert part.squared_norms is not None
    assert_close(part.squared_norms, whole.layer_squared_norms[1], EXACT)
    restricted = gradient_norms(Objective(model, nn.MSELoss(), (x, y)).restrict("2"))
    assert_close(restricted.squared_norms, part.squared_norms, EXACT)  # type: ignore[arg-type]


# -- parameters without a rule ----------------------------------------------------------------------------------------

ONE_BY_ONE: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], str]] = {
    "bilinear": (lambda: Own(lambda m, x: F.bilinear(x, x.cos(), m.w), w=(2, 4, 4)), (4,), "loop"),
    "PReLU": (lambda: nn.PReLU(3), (3, 2), "vmap"),
    "weight norm": (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)), (4,), "vmap"),
    "exponential of a gain": (lambda: Own(lambda m, x: x * m.g.exp(), g=(4,)), (3, 4), "vmap"),
    "known and unknown use": (lambda: Own(lambda m, x: F.linear(x, m.w) + (m.w**2).sum(), w=(3, 4)), (4,), "vmap"),
    "weight dropped in by data": (
        lambda: Own(lambda m, x: x * m.g if x.sum() > 1e9 else m.g.sin() * x, g=(4,)),
        (4,),
        "loop",
    ),
    "LSTM": (lambda: Own(lambda m, x: m.cell(x)[0]), (3, 4), "loop"),
}


@pytest.mark.parametrize("name", ONE_BY_ONE)
def test_use_that_no_rule_knows(name: str) -> None:
    build, shape, route = ONE_BY_ONE[name]
    model = build()
    if name == "LSTM":
        model.cell = nn.LSTM(4, 3, batch_first=True)
    moments = check(model, real(*shape))
    assert route in kinds(moments)
    assert all(": " in r for r in moments.routes.values() if r.startswith(("vmap", "loop")))
    with pytest.raises(InputError, match="route='auto'"):
        check(model, real(*shape), route="rules")


def test_random_masks_of_a_batch() -> None:
    x, y = real(4), real(3)
    known = nn.Sequential(nn.Dropout(0.5), nn.Linear(4, 3)).double()
    check_mean = Objective(known, nn.MSELoss(), (x, y))
    assert_close(gradient_norms(check_mean).mean, check_mean.gradient(), EXACT)
    unknown = Objective(nn.Sequential(known, nn.PReLU()).double(), nn.MSELoss(), (x, y))
    with pytest.raises(DataError, match="random numbers"):
        gradient_norms(unknown)


def test_wrong_rule_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """What does not add up to autograd's gradient is not believed, and said so."""
    right = Factors.__init__

    def wrong(self: Factors, left: Tensor, right_factor: object) -> None:
        right(self, left * 1.001, right_factor)  # type: ignore[arg-type]

    monkeypatch.setattr(Factors, "__init__", wrong)
    moments = check(nn.Linear(4, 3), real(2, 4))
    assert moments.routes["weight"] == "vmap: its uses by known layers do not add up to its gradient"


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("as many tokens as examples, time first", Layout.SECOND),
        ("tokens of all examples in turn", Layout.INTERLEAVED),
        ("flattened tokens", Layout.BLOCKS),
    ],
)
def test_where_examples_lie(name: str, layout: Layout) -> None:
    """Sums over all rows are right even where rows are given to the wrong examples: that is looked for by itself."""
    build, x = BY_RULES[name]
    model = build().double()
    evaluator = Objective(model, nn.MSELoss(), (x, model(x).detach())).evaluator
    (_, layouts), _ = layouts_of_uses(evaluator, (x, None), 0, N)
    assert set(layouts) == {layout}


def test_layers_behind_zeros_are_looked_at_again() -> None:
    """While a head is zero nothing shows in which rows examples lie, nor that they do."""
    build, x = BY_RULES["as many tokens as examples, time first"]
    model = nn.Sequential(build().double(), nn.Flatten())
    model.append(nn.Linear(model(x).shape[1], 2).double())
    targets, head = real(2), model[-1].weight.detach().clone()
    objective = Objective(model, nn.MSELoss(), (x, targets))
    with torch.no_grad():
        model[-1].weight.zero_()
        gradient_norms(objective)
        model[-1].weight.copy_(head)
    singles = [Objective(model, nn.MSELoss(), (x[i : i + 1], targets[i : i + 1])) for i in range(N)]
    expected = [single.gradient().square().sum() for single in singles]
    torch.testing.assert_close(gradient_norms(objective).squared_norms, torch.stack(expected))


@pytest.mark.parametrize("branches", [False, True])
def test_where_examples_lie_is_proved_once_unless_data_decide(branches: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that looks at a number may move rows by it: the proof is made for each batch then."""
    proofs: list[int] = []
    monkeypatch.setattr(batch, "follows", lambda *a: proofs.append(1) or follows(*a))
    plain = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2).eval(), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3))
    model = Own(lambda m, x: m.plain(x * 2 if branches and float(x.sum()) > 1e3 else x))
    model.plain = plain.double()
    data = [(real(1, 4, 4), torch.arange(5) % 3) for _ in range(3)]
    gradient_norms(Objective(model, nn.CrossEntropyLoss(), data))
    assert len(proofs) == 6 * (3 if branches else 1)  # weights and biases of three layers


def test_rows_that_mix_examples_are_found() -> None:
    model = Own(lambda m, x: F.linear(x.mean(0, keepdim=True), m.w) + F.linear(x, m.v), w=(3, 4), v=(3, 4)).double()
    evaluator = Objective(model, nn.MSELoss(), (real(4), real(3))).evaluator
    (structure, layouts), _ = layouts_of_uses(evaluator, (real(4), None), 0, N)
    assert [name for name, _ in structure] == ["linear", "linear"]
    assert layouts == (None, Layout.BLOCKS)


# -- how batches are fed ----------------------------------------------------------------------------------------------


def test_rows_of_tokens_and_mappings() -> None:
    model = Decoder(tied=True).double()
    targets = TOKENS.roll(1, 1)

    def forward(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        return model(batch["tokens"]).flatten(0, 1), batch["targets"].flatten()

    data = [{"tokens": TOKENS[:3], "targets": targets[:3]}, {"tokens": TOKENS[3:], "targets": targets[3:]}]
    objective = Objective(model, nn.CrossEntropyLoss(), data, forward=forward)
    rows = [
        flat_gradient(F.cross_entropy(model(TOKENS[i : i + 1])[0], targets[i]), list(model.parameters()))
        for i in range(N)
    ]
    for route in ("rules", "vmap", "loop"):
        moments = gradient_moments(objective, route=route)  # type: ignore[arg-type]
        assert moments.num_examples == N
        assert_close(moments.second_moment, torch.stack(rows).square().mean(0), EXACT)
    sites = [
        flat_gradient(F.cross_entropy(model(TOKENS[i : i + 1])[0, t], targets[i, t]), list(model.parameters()))
        for i in range(N)
        for t in range(4)
    ]
    per_target = gradient_moments(objective, per="target")
    assert_close(per_target.second_moment, torch.stack(sites).square().mean(0), EXACT)
    assert per_target.num_backwards == 4


def test_examples_along_another_dimension_are_refused() -> None:
    x, y = torch.randn(7, N, 4, dtype=torch.float64), real(3)

    class Last(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:  # noqa: A002
            return super().forward(input)[-1]

    with pytest.raises(DataError, match="first dimension"):
        gradient_norms(Objective(Last(4, 3).double(), nn.MSELoss(), (x, y)))


def test_half_precision_models() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 4))
    x, y = torch.randn(32, 16), torch.randint(4, (32,))
    exact = gradient_norms(Objective(model, nn.CrossEntropyLoss(), (x, y)))
    rough = gradient_norms(Objective(model.bfloat16(), nn.CrossEntropyLoss(), (x.bfloat16(), y)), route="rules")
    assert rough.squared_norms is not None
    assert exact.squared_norms is not None
    assert rough.squared_norms.dtype == torch.float32
    assert_close(rough.squared_norms, exact.squared_norms, 0.05)


def test_model_is_left_alone_after_an_error() -> None:
    class Failing(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:  # noqa: A002
            if len(input) != N:
                raise RuntimeError("no such batch")
            return super().forward(input)

    model = Failing(4, 3).double()
    model.weight.grad = torch.ones_like(model.weight)
    with assert_untouched(model), pytest.raises(DataError, match="does not run on a part of a batch"):
        gradient_norms(Objective(model, nn.MSELoss(), (real(4), real(3))))


class Masked(nn.Module):
    """Attention of which a row sees nothing."""

    def __init__(self, mask: Tensor, heads: bool) -> None:
        super().__init__()
        self.in_, self.out, self.mask = nn.Linear(4, 12), nn.Linear(4, 2), mask
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True) if heads else None

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.in_(x).chunk(3, -1)
        if self.attention is None:
            return self.out(F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None], self.mask)).mean((1, 2))
        return self.out(self.attention(q, k, v, attn_mask=self.mask, need_weights=False)[0]).mean(1)


@pytest.mark.parametrize("heads", [False, True])
@pytest.mark.parametrize("hidden", [-1e4, -1e30, torch.finfo(torch.float64).min, -math.inf])
def test_rows_of_attention_that_see_nothing(hidden: float, heads: bool) -> None:
    """Fused kernels of torch are wrong by half of the gradient where a mask is finite, and served in eval mode."""
    mask = torch.zeros(6, 6, dtype=torch.float64).masked_fill(torch.ones(6, 6).triu(1).bool(), hidden)
    mask[2] = hidden
    torch.manual_seed(0)
    check(Masked(mask, heads).eval(), real(6, 4))
