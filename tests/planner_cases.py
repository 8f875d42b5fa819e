"""Generated profiles and lengths for the planner's tests."""

from __future__ import annotations

from hypothesis import strategies as st

from flexsp.profile import AllToAll, Compute, Memory, Policy, Profile


def profile_of(
    num_devices: int = 8,
    devices_per_node: int = 8,
    sp_degrees: tuple[int, ...] = (1, 2, 4, 8),
    *,
    room_tokens: float = 1000.0,
    quadratic_s: float = 1e-7,
    linear_s: float = 1e-4,
    fixed_s: float = 0.1,
    exchange_s: float = 1e-5,
    between_nodes: float = 8.0,
    latency_s: float = 0.0,
    policies: dict[str, Policy] | None = None,
) -> Profile:
    """A profile in the terms that matter to a planner.

    Args:
        room_tokens: how many tokens one device holds.
        exchange_s: seconds of exchange per token and device inside a node.
        between_nodes: how many times that a degree larger than a node takes.
        latency_s: of every degree above 1.
    """
    inside = {d: exchange_s * (between_nodes if d > devices_per_node else 1.0) for d in sp_degrees if d > 1}
    return Profile(
        name="generated",
        num_devices=num_devices,
        devices_per_node=devices_per_node,
        sp_degrees=sp_degrees,
        compute=Compute(quadratic_s=quadratic_s, linear_s=linear_s, fixed_s=fixed_s),
        all_to_all=AllToAll(
            bytes_per_token=1.0 if exchange_s else 0.0,
            bandwidth_bytes_per_s={d: 1.0 / (seconds or 1.0) for d, seconds in inside.items()},
            latency_s={d: latency_s for d in inside} if latency_s else {},
        ),
        memory=Memory(
            memory_bytes=1000 + 100 * room_tokens,
            model_state_bytes=1000,
            activation_bytes_per_token=100,
            policies=policies or {},
        ),
    )


@st.composite
def profiles(draw: st.DrawFn, most_devices: int = 8, policies: bool = True) -> Profile:
    """Clusters of a few devices: nodes of any size, degrees of any kind, memory tight or wide, latencies or none."""
    num_devices = draw(st.integers(1, most_devices))
    devices_per_node = draw(st.integers(1, num_devices))
    degrees = draw(st.sets(st.sampled_from(range(1, num_devices + 1)), min_size=1))
    named = {}
    if policies and draw(st.booleans()):
        named["recompute"] = Policy(
            activation_bytes_per_token=draw(st.sampled_from([10, 40, 90])),
            compute_factor=draw(st.sampled_from([1.0, 1.1, 1.33])),
        )
    return profile_of(
        num_devices,
        devices_per_node,
        tuple(sorted(degrees)),
        room_tokens=draw(st.sampled_from([20, 100, 333.3, 1000])),
        quadratic_s=draw(st.sampled_from([0.0, 1e-7, 1e-5])),
        linear_s=draw(st.sampled_from([1e-4, 1e-3])),
        fixed_s=draw(st.sampled_from([0.0, 0.01, 0.1])),
        exchange_s=draw(st.sampled_from([1e-7, 1e-5, 1e-4])),
        between_nodes=draw(st.sampled_from([1.0, 8.0])),
        latency_s=draw(st.sampled_from([0.0, 0.001, 0.05])),
        policies=named,
    )


def lengths(most: int = 6) -> st.SearchStrategy[list[int]]:
    """A few lengths, often equal, some long."""
    return st.lists(
        st.one_of(st.integers(1, 60), st.sampled_from([1, 20, 100, 333, 400]), st.integers(1, 900)),
        min_size=1,
        max_size=most,
    )
