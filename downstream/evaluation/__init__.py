"""How good vectors are: ranking metrics, the protocol of both tasks, geometry, statistics."""
