"""Many requests at once: queue, policies, cost model, engine, and a simulator of the same."""
