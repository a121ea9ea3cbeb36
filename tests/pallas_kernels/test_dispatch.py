"""A named implementation never falls back; none means the platform's."""

from __future__ import annotations

import logging

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import _compat, _dispatch

BUILT = {"triton": lambda x: 2 * x, "xla": lambda x: 3 * x}


def test_unknown_and_missing_implementations_are_named():
    with pytest.raises(ValueError, match=r"scale: implementation 'mosaic' .* one of triton, xla"):
        _dispatch.call("scale", BUILT, "mosaic", 1.0)


def test_named_implementation_does_not_fall_back(monkeypatch):
    monkeypatch.setattr(_compat, "triton", None)
    with pytest.raises(ValueError, match="has no Pallas-Triton backend"):
        _dispatch.call("scale", BUILT, "triton", 1.0)


def test_a_kernel_is_not_for_a_cpu():
    with pytest.raises(ValueError, match=r"scale: implementation 'triton' is for NVIDIA GPUs, th"):
        _dispatch.call("scale", BUILT, "triton", 1.0)
    assert _dispatch.call("scale", BUILT, "triton", 1.0, interpret=True) == 2
    with _compat.described_gpu():
        assert _dispatch.call("scale", BUILT, "triton", 1.0) == 2


def test_falls_back_to_xla_and_says_so_once(monkeypatch, caplog):
    monkeypatch.setattr(_compat, "triton", None)
    _dispatch._say_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert [_dispatch.call("scale", BUILT, None, 1.0) for _ in range(2)] == [3.0, 3.0]
    assert len(caplog.records) == 1
    assert "XLA computes it" in caplog.text


def test_platform_decides_when_lowered():
    def f(x):
        return _dispatch.call("scale", BUILT, None, x)

    assert f(jnp.float32(1)) == 3
    with _compat.described_gpu():
        traced = jax.jit(f).trace(jax.ShapeDtypeStruct((), jnp.float32))
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert "2.0" in text
    assert "3.0" not in text


def test_mosaic_needs_a_newer_jax(monkeypatch):
    monkeypatch.setattr(_compat, "JAX_VERSION", (0, 10, 2))
    assert "0.11" in (_dispatch.unavailable("mosaic") or "")
