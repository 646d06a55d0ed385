"""One run in several processes: how they are launched, what they sum and gather, weights in
shards.
"""
