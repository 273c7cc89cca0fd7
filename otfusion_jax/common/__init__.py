"""What every other room uses: checks of arguments, ranges of numbers, batching.

`arguments` refuses what a caller has mistaken, `known` tells known values from traced ones,
`finiteness` finds numbers that are not finite, `scaling` keeps squares in range, and `batching`
says how many problems are worked on at once.
"""
