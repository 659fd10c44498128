"""What would happen: requests, queues and links in simulated time, from the same stages as every price.

    arrivals    when requests come: at a period, by chance, as recorded
    transfer    how long bytes take over a link that may follow a trace
    events      any mixture of devices, streams, policies and deadlines, event by event (SimPy): a Timeline
    fleet       thousands of equal devices on one edge, in a few array operations: latencies alone
"""
