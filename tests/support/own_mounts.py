"""Tests that mount a small disk of their own, in namespaces of the kernel where they need no rights."""

import subprocess

import pytest

NAMESPACES = ["unshare", "-Urm"]


def can_mount():
    try:
        return subprocess.run([*NAMESPACES, "true"], capture_output=True).returncode == 0
    except FileNotFoundError:
        return False


needs_own_mounts = pytest.mark.skipif(not can_mount(), reason="this kernel lets nobody mount a file system of his own")
