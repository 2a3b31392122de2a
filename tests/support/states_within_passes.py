"""Mamba-2's states in the middle of a pass, on the CPU: vLLM 0.32 asks its kernels there for them and gets none.

Where a prompt's last pass crosses the end of a block, vLLM has the states there written on the way. Its kernel for the
CPU returns those at the end alone, and the one that writes them is for GPUs, so that a prompt of several blocks a pass
ends in an ``IndexError``. Here its own kernel runs once for each stretch of tokens, from the states that the last one
left, and the states go where vLLM's metadata says.
"""

from __future__ import annotations

from contextlib import contextmanager

import torch


@contextmanager
def states_within_passes():
    """Have vLLM's Mamba-2 layers do this meanwhile; yields a list that grows with each pass that left such states."""
    from vllm.model_executor.layers.mamba import mamba_mixer2

    scan, written = mamba_mixer2.mamba_chunk_scan_combined_varlen, []

    def scan_all(x, dt, a, b, c, *, out, cu_seqlens, cu_chunk_seqlens, seq_idx, initial_states, **options):
        if not options.pop("return_intermediate_states", False):
            return scan(
                x, dt, a, b, c, out=out, cu_seqlens=cu_seqlens, cu_chunk_seqlens=cu_chunk_seqlens, seq_idx=seq_idx,
                initial_states=initial_states, **options,
            )  # fmt: skip
        found = []
        ends = cu_chunk_seqlens.tolist()
        for chunk, sequence in enumerate(seq_idx.tolist()):
            first = chunk == 0 or seq_idx[chunk - 1] != sequence
            before = found[-1] if not first else None if initial_states is None else initial_states[sequence][None]
            part, length = slice(ends[chunk], ends[chunk + 1]), ends[chunk + 1] - ends[chunk]
            whole = torch.tensor([0, length], dtype=torch.int32)
            computed = out[part].contiguous()
            found.append(
                scan(
                    x[part],
                    dt[part],
                    a,
                    b[part],
                    c[part],
                    out=computed,
                    cu_seqlens=whole,
                    cu_chunk_seqlens=whole,
                    seq_idx=torch.zeros(1, dtype=torch.int32),
                    initial_states=before,
                    **options,
                )
            )
            out[part] = computed
        return torch.cat(found)

    def store(checkpoint, chunk_idx, x, conv_state, chunk_states, ssm_state, query_start_loc, *, state_len):
        for row, offset in enumerate(checkpoint.offsets):
            if offset:
                block, end = checkpoint.state_indices[row], int(query_start_loc[row]) + offset
                conv_state[block, :, :state_len] = x[:, end - state_len : end]
                ssm_state[block] = chunk_states[chunk_idx[row]]
                written.append(offset)

    before = mamba_mixer2.store_prefill_checkpoint
    mamba_mixer2.mamba_chunk_scan_combined_varlen, mamba_mixer2.store_prefill_checkpoint = scan_all, store
    try:
        yield written
    finally:
        mamba_mixer2.mamba_chunk_scan_combined_varlen, mamba_mixer2.store_prefill_checkpoint = scan, before
