def draw(grid, table, results, stem):
    return []
