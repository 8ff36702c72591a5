            case CODEu: {
                for (var start = 0u; start < COLS; start += BLOCK) {
                    let units = min(BLOCK, COLS - start) >> 5u;
                    //STEP let n_$s = (start >> 5u) + inside(lane + 32u * $su, units);
                    //STEP //ROW var q$r_$s = dense_load_NAME(m, n$r + n_$s);
                    if COLS > BLOCK || !is_staged {
                        if !is_staged {
                            prepare(tid);
                        }
                        workgroupBarrier();
                        stage(start, units << 5u, tid);
                    }
                    if COLS <= BLOCK && !is_staged {
                        scale = input_scale(tid);
                        //KEEP
                    }
                    is_staged = true;
                    for (var base = lane; base < units + lane; base += STRIDE) {
                        //STEP let x$s = staged_unit(inside(base + 32u * $su, units));
                        //STEP //ROW acc$r += counted(dense_dot_NAME(q$r_$s, x$s), base + 32u * $su, units);
                        if base + STRIDE < units + lane {
                            //STEP let m_$s = (start >> 5u) + inside(base + STRIDE + 32u * $su, units);
                            //STEP //ROW q$r_$s = dense_load_NAME(m, n$r + m_$s);
                        }
                    }
                }
            }
