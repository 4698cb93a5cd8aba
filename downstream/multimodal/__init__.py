"""Multimodal recommenders: models of users and items that need item vectors, ranked by our protocol.

Their equations are those of the published code (MMRec), which differ from the papers' in places; each
module says where.
"""
