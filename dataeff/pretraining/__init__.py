"""Self-supervised pretraining: tasks that learn from images without labels, and score, embed or cluster them.

Source: spec initial_pools_active_learning, section 2.2.
"""
