            case CODEu: {
                for (var u = lane; u < units; u += 32u) {
                    let x = staged_unit(u);
                    //ROW acc$r += dense_dot_NAME(m, n$r + start_unit + u, x);
                }
            }
