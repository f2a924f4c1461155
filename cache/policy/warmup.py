"""What a warm-up may take: never what is likely to be used before it, and never all of a namespace."""


def outranks(last_use: float, now: float, expected_use_s: float) -> bool:
    """Whether an entry is worth more than one that is expected to be used in ``expected_use_s`` seconds.

    What was used so many seconds ago is expected to be used again in about as many.
    """
    return now - last_use < expected_use_s


def within_share(warmed: int, nbytes: int, budget: int, share: float) -> bool:
    """Whether ``nbytes`` more may be warmed, beside ``warmed`` bytes that nobody has used yet."""
    return warmed + nbytes <= share * budget
