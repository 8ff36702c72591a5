        case CODEu: { size = dense_size_NAME(m, n, half); }
