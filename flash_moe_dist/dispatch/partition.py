"""Which rank owns which expert.

Experts are rows of tables sharded on dim 0 over the ranks of `ep_mesh`, so a rank owns a
contiguous range of them. The arithmetic is that of `torch.chunk`, hence of DTensor's Shard(0):
the last ranks may own fewer experts than the others, or none.

    5 experts over 3 ranks: 0 1 | 2 3 | 4        2 experts over 3 ranks: 0 | 1 | none
"""


def experts_per_rank(num_experts: int, ep_size: int) -> int:
    """Number of experts that each rank but the last ones owns; 1 if there are no experts.

    The owner of an expert is expert_id // experts_per_rank.
    """
    return max(1, -(-num_experts // ep_size))


def num_local_experts(num_experts: int, ep_size: int, ep_rank: int) -> int:
    """Number of experts that rank `ep_rank` owns."""
    size = experts_per_rank(num_experts, ep_size)
    return max(0, min(size, num_experts - ep_rank * size))
