"""What a model would do on hardware that is described: the runtime's own decisions on a virtual clock, no weights.

Nothing here decides what is copied, evicted or computed next: `core`, `waves` and `speculation` do, as they do at run
time. What is here says how long things take (`costs`), what is asked for and what is predicted (`routing`).
"""
