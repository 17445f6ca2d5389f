"""Contracts to inherit in tests of one's own: a method that keeps `MethodContract` can be searched like any other."""

from __future__ import annotations

from autopeft.testing.contract import MethodContract

__all__ = ["MethodContract"]
