"""What a target domain of the cross-domain analysis shares with the training data."""

from __future__ import annotations

from vlm2rec.embedder.contract.dataset import Dataset


def shared_targets(home: Dataset, domain: Dataset) -> list[bool]:
    """Tell of each user of a target domain whether their test item is an item of the training data too."""
    known = set(home.item_ids)
    shared = [item in known for item in domain.item_ids]
    return [shared[row] for row in domain.histories("test").targets]


def shared_facts(home: Dataset, domain: Dataset) -> dict[str, int]:
    """Return the users and items in both, by their ids, and the users of the domain whose test item is in both."""
    return {
        "users": len({*home.user_ids}.intersection(domain.user_ids)),
        "items": len({*home.item_ids}.intersection(domain.item_ids)),
        "targets": sum(shared_targets(home, domain)),
    }
