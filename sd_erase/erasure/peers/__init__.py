"""Published methods, each written from its paper's equations, to be measured beside ours on the same bench; comparators, no more.

One file a method. Each erases the words of the concept's card that the base knows, as ours does, in plain captions, and keeps the
captions of the run's retain set where its paper keeps anything. They train in our loop, whose linear warm-up (5 % of the steps), cosine
schedule and clipping of gradients at norm 1 they share: ours, as is every setting that a file calls so.
"""
