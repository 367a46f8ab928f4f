"""What tests of batch invariance share: the same tokens in calls of any size, of any layer."""

import torch


def computed_alone(layer, tokens, few=1):
    """The output of all tokens, where a call has only ``few`` of them.

    Args:
        layer: a callable of ``hidden_states`` [T, H], ``top_k_index`` and ``top_k_weights`` [T, K] that gives [T, H].
        tokens: these three tensors.
    """
    parts = zip(*(tensor.split(few) for tensor in tokens), strict=True)
    return torch.cat([layer(*part) for part in parts])


def assert_same_bits(output, expected, what):
    """Every token has the bits that are expected, and none is all zeros."""
    differing = (output != expected).any(-1) | output.isnan().any(-1)
    assert not differing.any(), f"{what}: {differing.sum()} of {len(output)} tokens differ"
    assert output.any(-1).all()


def assert_invariant(layer, tokens, counts, expected):
    """Every token of calls of so many tokens has the bits ``expected``, at whatever place among whatever others."""
    hidden_states, index, weights = tokens
    for count in counts:
        places = torch.randperm(len(hidden_states), device=hidden_states.device)[:count]
        output = layer(hidden_states[places], index[places], weights[places])
        assert_same_bits(output, expected[places], f"calls of {count} tokens")
