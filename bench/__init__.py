"""Speed and memory of every op and of the whole model beside its peers: `python -m bench --help`."""
