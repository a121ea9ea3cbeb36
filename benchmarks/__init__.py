"""What jspeed is held to: timings, predictions, and claims that compiled plans can check.

Each script prints a table; those with a limit fail where it is passed.
"""
