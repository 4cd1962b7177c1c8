"""Experts split over devices: values, gradients, drops and errors, on eight virtual devices."""

from __future__ import annotations

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from moezoo.errors import UserError
from moezoo.ops import exchange, grouped
from moezoo.ops.capacity import by_probability
from moezoo.ops.expert_parallel import arrivals, as_routing, at_most, choices_of_device, room
from tests.ops import oracle
from tests.ops.cases import Gradients, Shape, arrays, assert_trees_close, mlp, problem, router
from tests.ops.test_exchange import mesh_of
from tests.ops.test_grouped import by_oracle, routing_of, run

LAYER = Shape(n=48, e=8, k=3, d=4, f=6)
SELECT = "softmax_then_top_k"
BACKENDS = {
    "gather": exchange.gather(grouped.blocks),
    "all_to_all": exchange.all_to_all(slots=LAYER.n),
    "ragged_all_to_all": exchange.ragged_all_to_all(rows=LAYER.n),
    "capacity": exchange.by_name("capacity"),
    "auto": exchange.by_name("auto"),
    "ragged": exchange.by_name("ragged"),
    "roomy": exchange.all_to_all(8.0, priority=by_probability),
    "tight": exchange.all_to_all(slots=1),
    "default": exchange.all_to_all(),
    "ragged_tight": exchange.ragged_all_to_all(rows=5),
}


def emulated(operand, output, from_P, send_P, to_P, receive_P, *, axis_name):
    """`lax.ragged_all_to_all` out of all_gathers, for a CPU."""
    me = lax.axis_index(axis_name)
    row = jnp.arange(operand.shape[0])
    sent = [lax.all_gather(a, axis_name) for a in (operand, from_P, send_P, to_P)]
    for rows, first_P, size_P, begin_P in zip(*sent, strict=True):
        first, size, begin = first_P[me], size_P[me], begin_P[me]
        to = jnp.where((row >= first) & (row < first + size), row - first + begin, len(output))
        output = output.at[to].set(rows, mode="drop")
    return output


@pytest.fixture
def has_ragged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exchange, "platform", lambda: "emulated")
    monkeypatch.setattr(lax, "ragged_all_to_all", emulated)


@cache
def runner(name: str, sizes: tuple[int, ...]):
    """(params, x_ND, routing, cotangent_ND) -> Gradients with everything on its devices."""
    mesh = mesh_of(*sizes)
    rows = NamedSharding(mesh, P(("data", "fsdp", "expert")))
    experts = NamedSharding(mesh, P("expert"))

    def value(params, x_ND, routing, cotangent_ND):
        def layer(params, x_ND, weights_NK):
            routed = routing._replace(weights_NK=weights_NK)
            return tuple(BACKENDS[name](mlp, params, x_ND, routed))

        args = (params, x_ND, routing.weights_NK)
        y_ND, pull, dropped = jax.vjp(layer, *args, has_aux=True)
        return Gradients(y_ND, dropped, *pull(cotangent_ND))

    compiled = jax.jit(value)

    def call(p, routing, cotangent_ND) -> Gradients:
        with jax.set_mesh(mesh):
            params = jax.device_put(arrays(p.params), experts)
            x_ND = jax.device_put(arrays(p.x_ND), rows)
            return compiled(params, x_ND, routing, arrays(cotangent_ND))

    return call


def check(name: str, sizes: tuple[int, ...], seed: int, hot: float = 0.0) -> None:
    """One random layer against the oracle; `hot` makes tokens prefer the first experts."""
    p = problem(LAYER, seed, padded=0.2)
    p = p._replace(logits_NE=p.logits_NE - hot * np.arange(LAYER.e))
    routing = router(SELECT, LAYER.k)(arrays(p.logits_NE), jnp.asarray(p.mask_N))
    cotangent_ND = np.random.default_rng(seed).normal(size=p.x_ND.shape)
    done = runner(name, sizes)(p, routing, cotangent_ND)
    assert int(done.dropped) == 0
    assert_trees_close(done.y_ND, by_oracle(SELECT, p, LAYER.k), atol=1e-4)
    truth = run("reference", p, routing, cotangent_ND)
    assert_trees_close(done[2:], truth[2:], rtol=1e-3, atol=1e-4)


FAST = [("gather", (1, 1, 4)), ("all_to_all", (1, 2, 2))]


@pytest.mark.parametrize(("name", "sizes"), FAST)
@settings(max_examples=8)
@given(seed=st.integers(0, 2**31 - 1), hot=st.sampled_from([0.0, 1.0, 50.0]))
def test_values_and_gradients(name: str, sizes: tuple[int, ...], seed: int, hot: float) -> None:
    check(name, sizes, seed, hot)


@pytest.mark.slow
def test_ragged_rows_travel_and_come_back(has_ragged: None) -> None:
    for seed, hot in ((0, 0.0), (1, 50.0)):
        check("ragged_all_to_all", (1, 2, 2), seed, hot)


SOME = [(1, 1, 1), (1, 1, 2), (2, 1, 4), (2, 1, 2, 2)]
OTHERS = [(2, 1, 1), (1, 2, 2), (1, 2, 4), (1, 1, 8)]
MESHES = [*SOME, *(pytest.param(sizes, marks=pytest.mark.claims) for sizes in OTHERS)]


@pytest.mark.slow
@pytest.mark.parametrize("sizes", MESHES)
@pytest.mark.parametrize("name", ["gather", "all_to_all", "ragged_all_to_all", "auto", "ragged"])
def test_every_mesh(name: str, sizes: tuple[int, ...], has_ragged: None) -> None:
    for seed, hot in ((0, 0.0), (1, 0.5), (2, 50.0)):
        check(name, sizes, seed, hot)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["roomy", "capacity"])
def test_room_by_a_factor(name: str) -> None:
    """Even choices of experts: nothing is dropped although room is limited."""
    p = problem(LAYER, seed=0)
    first = np.arange(LAYER.n) % LAYER.e
    experts_NK = (first[:, None] + np.arange(LAYER.k)) % LAYER.e
    routing = routing_of(experts_NK, LAYER.e)
    cotangent_ND = np.ones_like(p.x_ND)
    done = runner(name, (1, 1, 2))(p, routing, cotangent_ND)
    truth = run("reference", p, routing, cotangent_ND)
    assert_trees_close(done, truth, rtol=1e-3, atol=1e-4)


def keep_by_slots(chosen: list[dict[int, float]], devices: int, size: int, slots: int):
    """What is left when each of `devices` sends `slots` tokens at most to each other one."""
    kept = []
    for part in np.split(np.arange(len(chosen)), devices):
        inside: dict[int, set[int]] = {device: set() for device in range(devices)}
        for rank in range(LAYER.k):
            for n in part:
                device = list(chosen[n])[rank] // size if rank < len(chosen[n]) else None
                earlier = [e // size for e in list(chosen[n])[:rank]]
                if device is not None and device not in earlier and len(inside[device]) < slots:
                    inside[device].add(n)
        for n in part:
            kept.append({e: w for e, w in chosen[n].items() if n in inside[e // size]})
    return kept


@pytest.mark.slow
def test_choices_without_a_slot_are_dropped_and_counted() -> None:
    p = problem(LAYER, seed=3, padded=0.2)
    routing = router(SELECT, LAYER.k)(arrays(p.logits_NE), jnp.asarray(p.mask_N))
    done = runner("tight", (1, 1, 4))(p, routing, np.ones_like(p.x_ND))
    chosen = [
        oracle.choose(SELECT, logits, LAYER.k) if real else {}
        for logits, real in zip(p.logits_NE, p.mask_N, strict=True)
    ]
    kept = keep_by_slots(chosen, devices=4, size=2, slots=1)
    assert int(done.dropped) == sum(map(len, chosen)) - sum(map(len, kept)) > 0
    assert_trees_close(done.y_ND, oracle.layer(p.params, p.x_ND, kept), atol=1e-4)
    lost_NK = np.asarray(
        [[e not in kept[n] for e in row] for n, row in enumerate(np.asarray(routing.experts_NK))]
    )
    np.testing.assert_array_equal(np.asarray(done.dweights_NK)[lost_NK], 0.0)


@pytest.mark.slow
def test_a_full_receiver_drops_and_counts(has_ragged: None) -> None:
    p = problem(LAYER, seed=4)
    p = p._replace(logits_NE=p.logits_NE - 50.0 * np.arange(LAYER.e))
    routing = router(SELECT, LAYER.k)(arrays(p.logits_NE), jnp.asarray(p.mask_N))
    done = runner("ragged_tight", (1, 1, 2))(p, routing, np.ones_like(p.x_ND))
    assert int(done.dropped) == (LAYER.n - 5) * LAYER.k  # all want the first device
    whole = by_oracle(SELECT, p, LAYER.k)
    assert_trees_close(done.y_ND[:5], whole[:5], atol=1e-4)
    np.testing.assert_array_equal(done.y_ND[5:], 0.0)


def test_what_stands_in_padding_has_no_influence() -> None:
    p = problem(LAYER, seed=5, padded=0.4)
    routing = router(SELECT, LAYER.k)(arrays(p.logits_NE), jnp.asarray(p.mask_N))
    spoiled = p._replace(x_ND=np.where(p.mask_N[:, None], p.x_ND, np.nan))
    for name, sizes in FAST:
        clean = runner(name, sizes)(p, routing, np.ones_like(p.x_ND))
        dirty = runner(name, sizes)(spoiled, routing, np.ones_like(p.x_ND))
        for a, b in zip(jax.tree.leaves(clean), jax.tree.leaves(dirty), strict=True):
            np.testing.assert_array_equal(a, b)
        np.testing.assert_array_equal(dirty.y_ND[~p.mask_N], 0.0)


def traced(backend, sizes: tuple[int, ...], shape: Shape = LAYER) -> str:
    p = problem(shape, seed=0)
    routing = router(SELECT, shape.k)(arrays(p.logits_NE), jnp.asarray(p.mask_N))
    with jax.set_mesh(mesh_of(*sizes)):
        return str(
            jax.make_jaxpr(lambda *a: backend(mlp, *a))(*arrays((p.params, p.x_ND)), routing)
        )


def test_names_and_what_they_run() -> None:
    assert set(exchange.NAMES) >= {"auto", "blocks", "capacity", "gather", "all_to_all"}
    for name, operation in [
        ("auto", "all_gather"),
        ("blocks", "all_gather"),
        ("gather", "all_gather"),
        ("all_to_all", "all_to_all"),
        ("capacity", "all_to_all"),
    ]:
        assert exchange.by_name(name) is exchange.by_name(name)
        assert operation in traced(exchange.by_name(name), (1, 1, 2))
        alone = traced(exchange.by_name(name), (2, 1, 1))
        assert "all_gather" not in alone and "all_to_all" not in alone
    with pytest.raises(UserError, match="al_to_all.*all_to_all"):
        exchange.by_name("al_to_all")


def test_errors_come_before_compilation() -> None:
    odd = LAYER._replace(e=6)
    for name in ("gather", "all_to_all", "ragged_all_to_all", "capacity"):
        with pytest.raises(UserError, match="6 experts do not split evenly over mesh.expert=4"):
            traced(exchange.by_name(name), (1, 1, 4), odd)
    with pytest.raises(UserError, match="no ragged_all_to_all on CPU"):
        traced(exchange.by_name("ragged_all_to_all"), (1, 1, 2))
    with pytest.raises(UserError, match="factor is 0"):
        exchange.all_to_all(0)
    with pytest.raises(UserError, match="0 slots"):
        exchange.all_to_all(slots=0)


def test_tokens_that_cannot_be_split_evenly_take_the_plain_backend() -> None:
    shape = LAYER._replace(n=47)
    assert "shard_map" not in traced(exchange.by_name("gather"), (1, 1, 2), shape)
    assert "shard_map" not in traced(exchange.by_name("all_to_all"), (1, 1, 2), shape._replace(n=0))


def test_a_token_visits_a_device_once() -> None:
    experts_NK = jnp.asarray([[0, 1, 5], [-1, 4, 5], [7, 3, 6]])
    np.testing.assert_array_equal(arrivals(experts_NK, 4), [[0, -1, 1], [-1, 1, -1], [1, 0, -1]])
    own = choices_of_device(experts_NK, jnp.ones((3, 3)), jnp.asarray(4), 2)
    np.testing.assert_array_equal(own.experts_NK, [[-1, 1], [0, 1], [-1, -1]])
    np.testing.assert_array_equal(own.weights_NK, [[0, 1], [1, 1], [0, 0]])


def test_a_list_of_choices_is_bounded_and_counts_the_rest() -> None:
    shape = Shape(n=6, e=3, k=2, d=3, f=4)
    p = problem(shape, seed=0, padded=0.3)
    routing = router(SELECT, shape.k)(arrays(p.logits_NE), jnp.asarray(p.mask_N))
    args = arrays((p.params, p.x_ND))
    whole = jax.jit(partial(grouped.reference, mlp))(*args, routing)
    real = shape.k * int(p.mask_N.sum())
    exact, few = (at_most(grouped.reference, rows) for rows in (real, real - 1))
    done = jax.jit(lambda *a: (exact(mlp, *a), few(mlp, *a)))(*args, routing)
    assert_trees_close(done[0], whole)
    assert int(done[1].dropped) == 1


def test_room_of_an_even_load() -> None:
    assert room(100, 2, 8, 4, 1.0, None) == (47, 200)  # 1 - (6*5)/(8*7) of the tokens
    assert room(100, 2, 8, 8, 1.0, 7) == (7, 56)
    assert room(4, 4, 4, 2, 1.0, None) == (4, 16)
    assert as_routing(
        choices_of_device(jnp.zeros((2, 1), int), jnp.ones((2, 1)), jnp.asarray(0), 1), 1
    )
