"""Adam on the host beside jspeed's Adam on the device, in both engines."""

from __future__ import annotations

import importlib.util
import sys
import threading
import tracemalloc
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest

from jspeed.core.errors import MissingExtraError
from jspeed.offload import AdamRule, HostAdam, host_zeros
from jspeed.optim import make_optimizer

BFLOAT16, FLOAT16, FLOAT32 = (
    np.dtype(dtype) for dtype in (ml_dtypes.bfloat16, np.float16, np.float32)
)
NUMBA = importlib.util.find_spec("numba") is not None
needs_numba = pytest.mark.skipif(not NUMBA, reason="numba is not installed (extra `offload`)")
ENGINES = [pytest.param("numba", marks=needs_numba), "xla"]
RULE = AdamRule(eps=1e-8, weight_decay=0.1, decoupled=True, bias_corrected=True)
NUMBERS: dict[str, Any] = {
    "learning_rate": 0.01,
    "betas": (0.9, 0.95),
    "count": 1,
    "gradient_factor": 1.0,
}


@pytest.fixture(scope="module", params=ENGINES)
def engine(request: pytest.FixtureRequest) -> str:
    return request.param


def fresh(length: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    master = rng.standard_normal(length).astype(np.float32)
    return master, np.zeros(length, np.float32), np.zeros(length, np.float32)


def noise(length: int, dtype: np.dtype, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(100 + seed).standard_normal(length).astype(dtype)


def on_the_device(
    rule: AdamRule, start: np.ndarray, gradients: list[np.ndarray], factor: float, rate: float
) -> tuple[np.ndarray, Any]:
    """Master and state after `gradients`, by the transformation that trains on devices."""
    transformation = make_optimizer(
        type="Adam",
        params={
            "lr": rate,
            "betas": (0.9, 0.95),
            "eps": rule.eps,
            "weight_decay": rule.weight_decay,
            "adam_w_mode": rule.decoupled,
            "bias_correction": rule.bias_corrected,
        },
    )
    params = jnp.asarray(start)
    state = transformation.init(params)
    for gradient in gradients:
        scaled = jnp.asarray(gradient).astype(jnp.float32) * jnp.float32(factor)
        updates, state = transformation.update(scaled, state, params)
        params = optax.apply_updates(params, updates)
    return np.asarray(params), state


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16, FLOAT16], ids=str)
@pytest.mark.parametrize("bias_corrected", [True, False])
@pytest.mark.parametrize(("decoupled", "decay"), [(True, 0.1), (False, 0.1), (True, 0.0)])
def test_it_goes_where_the_devices_adam_goes(
    engine: str, decoupled: bool, decay: float, bias_corrected: bool, dtype: np.dtype, seed: int
) -> None:
    rule = AdamRule(1e-8, decay, decoupled, bias_corrected)
    length, factor, rate = 1003, 0.25, 0.01
    state, out = fresh(length, seed), np.empty(length, dtype)
    gradients = [noise(length, dtype, 10 * seed + i) for i in range(8)]
    expected, moments = on_the_device(rule, state[0].copy(), gradients, factor, rate)

    adam = HostAdam(rule, engine)  # pyright: ignore[reportArgumentType]
    for count, gradient in enumerate(gradients, 1):
        adam.update(
            state,
            gradient,
            out,
            learning_rate=rate,
            betas=(0.9, 0.95),
            count=count,
            gradient_factor=factor,
        )

    # An ulp of a parameter near 1 is 1.2e-7, of a moment 3e-8 at most; eight steps, each rounded.
    np.testing.assert_allclose(state[0], expected, rtol=2e-7, atol=1e-7)
    np.testing.assert_allclose(state[1], moments.mu, rtol=3e-7, atol=4e-8)
    np.testing.assert_allclose(state[2], moments.nu, rtol=6e-7, atol=1e-9)
    np.testing.assert_array_equal(out, state[0].astype(dtype))
    assert np.median(np.abs(state[0] - fresh(length, seed)[0])) > 0.01


@pytest.mark.parametrize("length", [0, 1, 2, 15, 4095, 4097, 65537, 300_001])
def test_any_length_and_place_in_memory(engine: str, length: int) -> None:
    whole = HostAdam(RULE, engine, threads=2)  # pyright: ignore[reportArgumentType]
    arrays = [*fresh(length), noise(length, BFLOAT16), np.zeros(length, BFLOAT16)]
    expected = on_the_device(RULE, arrays[0].copy(), [arrays[3]], 1.0, 0.01)[0]
    # Each begins at an odd byte and has neighbours, which must not change.
    rooms = [np.full(array.nbytes + 22, 77, np.uint8) for array in arrays]
    views = [room[11:-11].view(a.dtype) for room, a in zip(rooms, arrays, strict=True)]
    for view, array in zip(views, arrays, strict=True):
        view[:] = array

    whole.update(tuple(views[:3]), views[3], views[4], **NUMBERS)  # pyright: ignore

    np.testing.assert_allclose(views[0], expected, rtol=2e-7, atol=1e-7)
    np.testing.assert_array_equal(views[4], views[0].astype(BFLOAT16))
    assert all((room[:11] == 77).all() and (room[-11:] == 77).all() for room in rooms)


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16, FLOAT16], ids=str)
def test_what_is_not_finite_stays_so_and_stays_alone(engine: str, dtype: np.dtype) -> None:
    state, out = fresh(64), np.empty(64, dtype)
    gradient = noise(64, dtype)
    gradient[[3, 20, 40]] = np.inf, -np.inf, np.nan
    bad = np.isin(np.arange(64), [3, 20, 40])
    HostAdam(RULE, engine).update(state, gradient, out, **NUMBERS)  # pyright: ignore
    for array in (*state[:2], out.astype(np.float32)):
        np.testing.assert_array_equal(~np.isfinite(array), bad)
    np.testing.assert_array_equal(np.isnan(out.astype(np.float32)), bad)


def test_an_overflow_of_the_second_moment_stops_the_parameter(engine: str) -> None:
    state, out = fresh(16), np.empty(16, np.float32)
    before = state[0].copy()
    gradient = np.full(16, 1e25, np.float32)
    rule = AdamRule(1e-8, 0.0, True, True)
    HostAdam(rule, engine).update(state, gradient, out, **NUMBERS)  # pyright: ignore
    assert np.isinf(state[2]).all()
    # m / sqrt(inf) is 0, as on the device; approximate square roots make it NaN
    np.testing.assert_array_equal(out, before)


SPECIAL = [
    *(1.0, 1.00390625, 1.01171875, 0.1, -3.3, 0.0, -0.0),  # the second and third are ties
    *(6e-8, 2.98e-8, 1e-7, 65504.0, 65519.0, 65520.0, 3.39e38, 3.3961e38),
    *(np.inf, -np.inf, np.nan, -np.nan, 1e-40),
]


@pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT16], ids=str)
def test_rounding_of_every_kind_of_number(engine: str, dtype: np.dtype) -> None:
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 2**32, 100_000, np.uint32).view(np.float32)
    payload = np.array([0x7F800001, 0x7FFFFFFF, 0xFFFFFFFF, 0x7F80FFFF], np.uint32)
    master = np.concatenate([np.array(SPECIAL, np.float32), bits, payload.view(np.float32)])
    expected = master.copy()
    state = (master, np.zeros_like(master), np.zeros_like(master))
    out = np.empty(len(master), dtype)
    rule = AdamRule(1e-8, 0.0, True, True)
    numbers = NUMBERS | {"learning_rate": 0.0}
    gradient = np.zeros(len(master), dtype)
    HostAdam(rule, engine).update(state, gradient, out, **numbers)  # pyright: ignore
    with np.errstate(over="ignore", invalid="ignore"):
        rounded = expected.astype(dtype).astype(np.float32)
    # XLA takes float32 numbers below the smallest normal one for 0.
    alike = ~(np.abs(expected) < np.finfo(np.float32).tiny) | (engine == "numba")
    np.testing.assert_array_equal(out.astype(np.float32)[alike], rounded[alike])


@pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT16], ids=str)
def test_every_16_bit_gradient_is_read_exactly(engine: str, dtype: np.dtype) -> None:
    gradient = np.arange(2**16, dtype=np.uint16).view(dtype)
    state, out = fresh(2**16), np.empty(2**16, np.float32)
    rule = AdamRule(1e-8, 0.0, True, True)
    numbers = NUMBERS | {"betas": (0.0, 0.0)}
    HostAdam(rule, engine).update(state, gradient, out, **numbers)  # pyright: ignore
    expected = gradient.astype(np.float32)
    # XLA takes float32 numbers below the smallest normal one for 0.
    normal = ~(np.abs(expected) < np.finfo(np.float32).tiny)
    np.testing.assert_array_equal(state[1][normal], expected[normal])


def test_out_may_be_the_master_or_the_gradients_memory(engine: str) -> None:
    adam = HostAdam(RULE, engine, threads=2)  # pyright: ignore[reportArgumentType]
    apart, out = fresh(200_001), np.empty(200_001, BFLOAT16)
    gradient = noise(200_001, BFLOAT16)
    adam.update(apart, gradient, out, **NUMBERS)
    shared = fresh(200_001)
    adam.update(shared, gradient.copy(), shared[0], **NUMBERS)
    again, both = fresh(200_001), gradient.copy()
    adam.update(again, both, both, **NUMBERS)
    for got in (shared, again):
        for a, b in zip(got, apart, strict=True):
            np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(both, out)


def test_a_read_only_gradient_as_jax_gives_it(engine: str) -> None:
    gradient = np.asarray(jax.device_put(noise(10, BFLOAT16)))
    assert not gradient.flags.writeable
    state, out = fresh(10), np.empty(10, BFLOAT16)
    HostAdam(RULE, engine).update(state, gradient, out, **NUMBERS)  # pyright: ignore
    expected = on_the_device(RULE, fresh(10)[0], [gradient], 1.0, 0.01)[0]
    np.testing.assert_allclose(state[0], expected, rtol=2e-7, atol=1e-7)


def test_no_copy_of_the_state_is_made(engine: str) -> None:
    length = 4_000_000
    state, out = fresh(length), np.empty(length, BFLOAT16)
    gradient = noise(length, BFLOAT16)
    adam = HostAdam(RULE, engine)  # pyright: ignore[reportArgumentType]
    adam.prepare(BFLOAT16, BFLOAT16)
    addresses = [array.ctypes.data for array in state]
    tracemalloc.start()
    adam.update(state, gradient, out, **NUMBERS)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [array.ctypes.data for array in state] == addresses
    assert peak < state[0].nbytes / 2  # XLA fills up the last tile
    assert np.all(state[1] != 0)


@pytest.mark.parametrize("threads", [1, 3])
def test_threads_are_as_many_as_asked_for(
    engine: str, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    adam = HostAdam(RULE, engine, threads=threads)  # pyright: ignore[reportArgumentType]
    meeting, met = threading.Barrier(threads), set()

    def meet(*_: Any) -> None:
        met.add(threading.get_ident())
        meeting.wait(20)  # fewer do not get past it

    place = sys.modules[type(adam._kernel).__module__] if engine == "numba" else adam._kernel
    monkeypatch.setattr(place, "_tiles", meet)
    length = 2_000_000
    adam.update(fresh(length), noise(length, FLOAT32), np.empty(length, np.float32), **NUMBERS)
    assert len(met) == threads
    assert threading.get_ident() in met


def test_two_updates_at_once(engine: str) -> None:
    """Numba's own threads would end the process here."""
    adam = HostAdam(RULE, engine, threads=2)  # pyright: ignore[reportArgumentType]
    states = [fresh(500_000, seed) for seed in range(4)]
    gradient = noise(500_000, FLOAT32)

    def work(state: Any) -> None:
        adam.update(state, gradient, state[0], **NUMBERS)

    callers = [threading.Thread(target=work, args=(state,)) for state in states]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(60)
    for seed, state in enumerate(states):
        expected = on_the_device(RULE, fresh(500_000, seed)[0], [gradient], 1.0, 0.01)[0]
        np.testing.assert_allclose(state[0], expected, rtol=2e-7, atol=1e-7)


def test_without_numba_xla_takes_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jspeed.offload._numba_adam", None)
    adam = HostAdam(RULE)
    assert adam.engine == "xla"
    assert 'pip install "jspeed[offload]"' in adam.reason
    with pytest.raises(MissingExtraError, match=r'pip install "jspeed\[offload\]"'):
        HostAdam(RULE, "numba")


@pytest.mark.parametrize("length", [0, 1, 1_000_001])
def test_xla_reads_zeros_of_the_host_where_they_are(length: int) -> None:
    for dtype in (FLOAT32, BFLOAT16):
        zeros = host_zeros(length, dtype)
        assert (zeros.shape, zeros.dtype, zeros.flags.writeable) == ((length,), dtype, True)
        assert not zeros.any()
        if length:
            shown = jax.device_put(zeros, jax.local_devices(backend="cpu")[0])
            assert shown.unsafe_buffer_pointer() == zeros.ctypes.data


def with_zeros(adam: HostAdam, length: int, seed: int = 0) -> Any:
    """`fresh`, in memory of the engine's choice."""
    state = tuple(adam.zeros(length) for _ in range(3))
    state[0][:] = fresh(length, seed)[0]
    return state


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16, FLOAT16], ids=str)
@pytest.mark.parametrize(("decoupled", "decay"), [(True, 0.1), (False, 0.1), (True, 0.0)])
@pytest.mark.parametrize("length", [1, 70_001, 1_300_000])
def test_memory_of_the_engines_choice_gets_the_same_numbers(
    engine: str, length: int, decoupled: bool, decay: float, dtype: np.dtype
) -> None:
    rule = AdamRule(1e-8, decay, decoupled, True)
    adam = HostAdam(rule, engine, threads=2)  # pyright: ignore[reportArgumentType]
    state, out = with_zeros(adam, length), np.empty(length, dtype)
    assert all(array.flags.writeable and array.dtype == FLOAT32 for array in state)
    gradients = [noise(length, dtype, seed) for seed in range(2)]
    expected, moments = on_the_device(rule, state[0].copy(), gradients, 0.5, 0.01)
    for count, gradient in enumerate(gradients, 1):
        numbers = NUMBERS | {"count": count, "gradient_factor": 0.5}
        adam.update(state, gradient, out, **numbers)
    # As in the first test; of a million L2 gradients some are differences that all but vanish, and
    # steps, of 0.01, follow their signs.
    np.testing.assert_allclose(state[0], expected, rtol=0, atol=5e-6)
    np.testing.assert_allclose(state[1], moments.mu, rtol=3e-7, atol=4e-8)
    np.testing.assert_allclose(state[2], moments.nu, rtol=6e-7, atol=1e-9)
    np.testing.assert_array_equal(out, state[0].astype(dtype))


def test_xla_updates_its_own_memory_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    adam = HostAdam(RULE, "xla")
    kernel: Any = adam._kernel
    monkeypatch.setattr(kernel, "_tiles", None)  # it needs none
    state = with_zeros(adam, 1000)
    addresses = {array.ctypes.data for array in state}
    for _ in range(2):
        adam.update(state, noise(1000, FLOAT32), state[0], **NUMBERS)
        kept = kernel._memory._arrays
        assert {array.unsafe_buffer_pointer() for array in kept.values()} == addresses == set(kept)
    assert np.all(state[1] != 0)


def test_xla_updates_parts_and_arrays_that_something_else_uses() -> None:
    adam = HostAdam(RULE, "xla")
    kernel: Any = adam._kernel
    whole, parts, used = (with_zeros(adam, 1000) for _ in range(3))
    gradient = noise(1000, FLOAT32)
    adam.update(whole, gradient, whole[0], **NUMBERS)
    for part in (slice(0, 300), slice(300, 1000)):
        views: Any = tuple(array[part] for array in parts)
        adam.update(views, gradient[part], views[0], **NUMBERS)
    users = [np.asarray(array) for array in kernel._memory.arrays(used)]  # they forbid donation
    adam.update(used, gradient, used[0], **NUMBERS)
    for state in (parts, used):
        for got, expected in zip(state, whole, strict=True):
            np.testing.assert_array_equal(got, expected)
    assert np.all(users[1] != 0)


def test_xlas_memory_lives_as_long_as_a_view_of_it() -> None:
    adam = HostAdam(RULE, "xla")
    kept: Any = adam._kernel._memory._arrays  # pyright: ignore[reportAttributeAccessIssue]
    vector = adam.zeros(1000)
    view = vector[10:20]
    del vector
    assert len(kept) == 1
    view[:] = 1
    del view
    assert not kept


@needs_numba
def test_auto_takes_numba() -> None:
    assert HostAdam(RULE).engine == "numba"


def refused(change: dict[str, Any]) -> str:
    master, mu, nu = fresh(8)
    given: dict[str, Any] = {"master": master, "mu": mu, "nu": nu, "gradient": noise(8, FLOAT32)}
    given |= {"out": np.empty(8, np.float32)} | NUMBERS
    given |= {name: make(given) for name, make in change.items()}
    state = tuple(given.pop(name) for name in ("master", "mu", "nu"))
    with pytest.raises(ValueError, match=r"^HostAdam\.update: ") as caught:
        HostAdam(RULE, "xla").update(state, **given)  # pyright: ignore[reportArgumentType]
    np.testing.assert_array_equal(master, fresh(8)[0])
    return str(caught.value)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"gradient": lambda g: np.zeros(7, np.float32)}, r"gradient is float32[7]; expected a"),
        ({"gradient": lambda g: np.zeros(8)}, "gradient is float64[8]; expected a vector of 8 "),
        ({"mu": lambda g: g["mu"].astype(np.float16)}, "mu is float16[8]; expected a vector of 8"),
        ({"nu": lambda g: np.zeros(16, np.float32)[::2]}, "nu must be contiguous and writable"),
        ({"out": lambda g: np.asarray(jnp.zeros(8))}, "out must be contiguous and writable"),
        ({"out": lambda g: g["mu"]}, "mu and out overlap in memory"),
        ({"count": lambda g: 0}, "count is 0 and betas are (0.9, 0.95); expected a count of at"),
        ({"betas": lambda g: (0.9, 1.0)}, "betas are (0.9, 1.0); expected a count of at least 1"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, Any], text: str) -> None:
    assert text in refused(change)


def test_a_shifted_overlap_is_refused() -> None:
    memory = np.zeros(12, np.float32)
    master, mu, nu = memory[:8], *np.zeros((2, 8), np.float32)
    with pytest.raises(ValueError, match="master and out overlap in memory"):
        HostAdam(RULE, "xla").update((master, mu, nu), noise(8, FLOAT32), memory[4:], **NUMBERS)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"engine": "torch"}, "engine is 'torch'; expected 'auto', 'numba' or 'xla'"),
        ({"threads": 0}, "threads is 0; expected at least 1"),
    ],
)
def test_what_it_cannot_be_made_of_is_refused(arguments: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        HostAdam(RULE, **arguments)
