"""Which rows of a data set does the aligned model see as harmful requests?"""
