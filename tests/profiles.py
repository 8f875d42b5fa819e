"""Small profiles for tests."""

from __future__ import annotations

from typing import Any

from flexsp.profile import Profile


def profile_json(num_devices: int = 4, capacity: int = 100, **changes: Any) -> dict[str, Any]:
    """A profile of powers of two on one node; a rank holds `capacity` tokens."""
    degrees = [d for d in (1, 2, 4, 8, 16, 32, 64) if d <= num_devices]
    document = {
        "format": "flexsp-profile/1",
        "name": "test",
        "num_devices": num_devices,
        "devices_per_node": min(8, num_devices),
        "sp_degrees": degrees,
        "compute": {"quadratic_s": 1e-5, "linear_s": 1e-3, "fixed_s": 0.02},
        "all_to_all": {
            "bytes_per_token": 1000,
            "bandwidth_bytes_per_s": {str(d): 4e6 / d for d in degrees if d > 1},
            "latency_s": {str(d): 0.002 * d for d in degrees if d > 1},
        },
        "memory": {
            "memory_bytes": 1000 + 10 * capacity,
            "model_state_bytes": 1000,
            "activation_bytes_per_token": 10,
        },
        "provenance": {"source": "estimated"},
    }
    return {**document, **changes}


def profile(num_devices: int = 4, capacity: int = 100, **changes: Any) -> Profile:
    return Profile.from_json(profile_json(num_devices, capacity, **changes))
