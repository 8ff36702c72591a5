        case CODEu: { eight = dense_eight_NAME(m, n, part); }
