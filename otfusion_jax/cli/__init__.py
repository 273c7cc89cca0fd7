"""The command line `otfusion`: to inspect, align, fuse, check and compare networks in files."""
